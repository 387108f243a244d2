"""Token files and what is known of them, read by memory map.

A folder of tokens has, for each split NAME, `NAME.bin` (ids, uint16 or uint32, low byte first), `NAME.starts` (int64,
where documents start), and one sidecar `tokens.json` with counts, hashes, tokenizer and source.

Loading checks sizes and the hashes of the first and last MiB of the ids, which finds a file cut short or exchanged and
costs nothing; `Tokens.verify` reads everything.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mamba2.data.splits import choose_split
from mamba2.files import write_text
from mamba2.tokenizer import Tokenizer

SIDECAR = "tokens.json"
FORMAT = 1
EDGE = 2**20  # bytes


@dataclass(frozen=True)
class Tokens:
    """One split as a flat array of ids, and where its documents start."""

    ids: "np.ndarray | Shards"  # (tokens,) uint16 or uint32, perhaps a memory map; sliced, never indexed
    starts: np.ndarray  # (documents,) int64
    eot_id: int
    largest: int  # id
    files: tuple[Path, ...] = ()  # that hold the ids, in order; none if they lie in memory
    recorded_sha256: str | None = None
    counted: np.ndarray | None = None  # (tokens,) bool: whether predicting an id counts; None: all do
    sample_length: int | None = None  # windows must not cut samples of this length
    empty: int = 0  # documents of the source that are left out
    source: dict | None = None  # split and files that the ids came from; see mamba2/data/splits.py

    @cached_property
    def sha256(self) -> str:
        """Hash of the content: of the bytes of `files` one after the other, as recorded when they were written or first
        read; of the ids when they lie in memory."""
        return self.recorded_sha256 or hashlib.sha256(np.ascontiguousarray(self.ids).tobytes()).hexdigest()

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError if an id has no row in a vocabulary of that size."""
        if self.largest >= vocab_size:
            raise ValueError(f"the data hold the id {self.largest}, outside the model's vocabulary of {vocab_size}")

    def verify(self) -> None:
        """Read every byte again. Raises ValueError naming the files if they are not what was recorded."""
        if self.files and files_sha256(self.files) != self.recorded_sha256:
            raise ValueError(f"{', '.join(map(str, self.files))} changed: the content has another hash than recorded")


class Shards:
    """Several arrays that are sliced as if they were one."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays, self.dtype = list(arrays), arrays[0].dtype
        self.ends = np.cumsum([len(array) for array in arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        pieces = [np.empty(0, self.dtype)]
        number = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            first = self.ends[number] - len(self.arrays[number])
            pieces.append(self.arrays[number][start - first : stop - first])
            start, number = int(self.ends[number]), number + 1
        return np.concatenate(pieces)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)


def files_sha256(files: Sequence[Path]) -> str:
    """Of the bytes of the files one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            while block := opened.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def edges_sha256(file: Path) -> str:
    """Of the first and the last MiB of a file."""
    with open(file, "rb") as opened:
        digest = hashlib.sha256(opened.read(EDGE))
        opened.seek(max(0, os.fstat(opened.fileno()).st_size - EDGE))
        digest.update(opened.read(EDGE))
    return digest.hexdigest()


def write_sidecar(
    folder: Path, splits: dict[str, dict], tokenizer: Tokenizer | None, eot_id: int, dtype: str, plan: dict
) -> None:
    """Write `tokens.json` at once and flushed. `splits`: what is known of each file; `plan`: where it came from."""
    content = {
        "format": FORMAT,
        "tokenizer": None if tokenizer is None else {"name": tokenizer.name, "identity": tokenizer.identity},
        "vocab_size": None if tokenizer is None else tokenizer.vocab_size,
        "eot_id": eot_id,
        "dtype": dtype,
        "splits": splits,
        "plan": plan,
    }
    write_text(folder / SIDECAR, json.dumps(content, indent=2) + "\n")


def open_tokens(folder: Path, split: str, tokenizer: Tokenizer | None) -> Tokens:
    """A split of a folder of tokens. `validation` is its `val`. A `tokenizer` of None fits every folder.

    Raises ValueError when the split is not there, was made with another tokenizer, or is not what the sidecar says.
    """
    try:
        content = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
        form, splits = content["format"], content["splits"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / SIDECAR} is damaged: {error!r}") from error
    if form != FORMAT:
        raise ValueError(f"{folder / SIDECAR} has format {form}; this version reads {FORMAT}")
    entry = splits[choose_split(split, splits, folder)]
    made_with = content["tokenizer"]
    if tokenizer is not None and made_with is not None and made_with["identity"] != tokenizer.identity:
        raise ValueError(
            f"{folder} was made with the tokenizer {made_with['name']}, and the model has {tokenizer.name}; "
            "prepare the data with the model's"
        )
    files = tuple(folder / file["path"] for file in entry["files"])
    for file, known in zip(files, entry["files"]):
        _check(file, known)
    starts = folder / entry["starts"]
    if starts.stat().st_size != 8 * entry["documents"]:
        raise ValueError(f"{starts} has {starts.stat().st_size} bytes instead of {8 * entry['documents']}: damaged")
    header = entry.get("header", 0)
    arrays = [np.memmap(file, dtype=content["dtype"], mode="r", offset=header) for file in files]
    ids = arrays[0] if len(arrays) == 1 else Shards(arrays)
    starts = np.memmap(starts, dtype="<i8", mode="r")
    return Tokens(
        ids,
        starts,
        content["eot_id"],
        entry["largest"],
        files,
        entry["sha256"],
        empty=entry.get("empty", 0),
        source=entry.get("source"),
    )


def _check(file: Path, known: dict) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; the sidecar beside it names it")
    size = file.stat().st_size
    if size != known["bytes"]:
        raise ValueError(
            f"{file} has {size} bytes, and {known['bytes']} when it was recorded: it is cut short or changed"
        )
    if edges_sha256(file) != known["edges"]:
        raise ValueError(f"{file} changed since it was recorded: its first or last MiB has another hash")
