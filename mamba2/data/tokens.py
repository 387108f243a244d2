"""Token files, read by memory map, and the sidecar that describes them.

A folder of tokens has, for each split NAME, `NAME.bin` (ids, little-endian uint16 or uint32) and `NAME.starts` (int64,
where documents start), and one sidecar `tokens.json` with counts, hashes, tokenizer and source.

Loading checks the sizes and the hashes of the first and last MiB of the ids, which takes no time and finds files that
were cut short or replaced. `Tokens.verify` reads everything.
"""

import hashlib
import json
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

    ids: "np.ndarray | Shards"  # (tokens,) uint16 or uint32, perhaps a memory map; take slices, not single ids
    starts: np.ndarray  # (documents,) int64
    eot_id: int
    largest: int  # the largest id
    files: tuple[Path, ...] = ()  # that hold the ids, in order; none if the ids are in memory
    recorded_sha256: str | None = None
    counted: np.ndarray | None = None  # (tokens,) bool: whether an id counts in the loss; None: all do
    sample_length: int | None = None  # windows must not cut samples of this length
    empty: int = 0  # number of empty documents in the source, which were left out
    source: dict | None = None  # split and files that the ids came from, for `describe` in mamba2/data/splits.py

    @cached_property
    def sha256(self) -> str:
        """Hash of the bytes of `files` in order, as recorded when they were written or first read; if there are none,
        of the bytes of the ids."""
        return self.recorded_sha256 or hashlib.sha256(np.ascontiguousarray(self.ids).tobytes()).hexdigest()

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError if an id is outside a vocabulary of that size."""
        if self.largest >= vocab_size:
            raise ValueError(f"the data hold the id {self.largest}, outside the model's vocabulary of {vocab_size}")

    def verify(self) -> None:
        """Read every byte again. Raises ValueError naming the files if their hash is not the recorded one."""
        if self.files and files_sha256(self.files) != self.recorded_sha256:
            raise ValueError(f"{', '.join(map(str, self.files))} changed: the content has another hash than recorded")


class Shards:
    """Several arrays (tokens,) that can be sliced like one. A slice is a copy."""

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
    """Hash of the bytes of the files in order."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            hashlib.file_digest(opened, lambda: digest)
    return digest.hexdigest()


def edges_sha256(file: Path) -> str:
    """Hash of the first and the last MiB of a file."""
    with open(file, "rb") as opened:
        digest = hashlib.sha256(opened.read(EDGE))
        opened.seek(max(0, file.stat().st_size - EDGE))
        digest.update(opened.read(EDGE))
    return digest.hexdigest()


def write_sidecar(
    folder: Path, splits: dict[str, dict], tokenizer: Tokenizer | None, eot_id: int, dtype: str, plan: dict
) -> None:
    """Write `tokens.json`, whole and flushed. `splits`: the entry of each file; `plan`: what they were made from."""
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
    """A split of a folder of tokens; `validation` means its `val`. With a `tokenizer` of None any folder is accepted.

    Raises ValueError if the split is missing, was made with another tokenizer, or differs from what the sidecar says;
    FileNotFoundError if a file is missing.
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
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; the sidecar beside it names it")
        if (size := file.stat().st_size) != known["bytes"]:
            raise ValueError(
                f"{file} has {size} bytes, and {known['bytes']} when it was recorded: it is cut short or changed"
            )
        if edges_sha256(file) != known["edges"]:
            raise ValueError(f"{file} changed since it was recorded: its first or last MiB has another hash")
    starts = folder / entry["starts"]
    if starts.stat().st_size != 8 * entry["documents"]:
        raise ValueError(f"{starts} has {starts.stat().st_size} bytes instead of {8 * entry['documents']}: damaged")
    arrays = [np.memmap(file, content["dtype"], mode="r", offset=entry.get("header", 0)) for file in files]
    return Tokens(
        arrays[0] if len(arrays) == 1 else Shards(arrays),
        np.memmap(starts, dtype="<i8", mode="r"),
        content["eot_id"],
        entry["largest"],
        files,
        entry["sha256"],
        empty=entry.get("empty", 0),
        source=entry.get("source"),
    )
