"""Text to documents, documents to a file of tokens, tokens to batches.

A source is one of
    stdlib                      the source of the Python standard library that runs this: real text on every machine
    a .txt, .jsonl, .json or .parquet file, or a folder of them (each text file is one document)
    a folder laid out as the hub's, NAME/CONFIG/SPLIT-*.parquet
    a folder written by `datasets`' save_to_disk
    NAME or NAME:CONFIG         a data set of the hub
with the column `text`, or `input_ids` that are taken as they are.

Documents are encoded, each followed by end-of-text, into one flat file, and cut into windows of T + 1 tokens that start
every T tokens. A new document inside a window starts with an empty state (`seq_idx`).
"""

import hashlib
import itertools
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mamba2.checkpoint import atomic_folder
from mamba2.ops import IGNORE_INDEX
from mamba2.tokenizer import Tokenizer

STDLIB = "stdlib"
LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
VALIDATION_SPLITS = ("validation", "val", "test")

# Of the standard library one file in 20 is held out, chosen by its content: copies of a file fall on the same side.
STDLIB_HELD_OUT = 20


def read_documents(source: str | os.PathLike, split: str, config: str | None = None) -> Iterator[str | list[int]]:
    """Documents of one split, as text or as ids.

    Raises FileNotFoundError for a source that is not there, ValueError for a split or a column that is not.
    """
    source = str(source)
    name, _, suffix = source.partition(":")
    if source == STDLIB:
        return _stdlib(split)
    path = Path(source)
    if path.is_dir() and any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        return _column(_saved(path, split), source)
    if path.exists():
        return _files(path, split, config)
    if path.is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise FileNotFoundError(f"no data at {source}")
    return _hub(name, config or suffix or None, split)


def wikitext_articles(lines: Iterator[str]) -> Iterator[str]:
    """Join the lines of WikiText into articles: one begins at a heading of the first level, ` = Title = `."""
    article: list[str] = []
    for line in lines:
        heading = line.strip()
        if heading.startswith("= ") and heading.endswith(" =") and not heading.startswith("= =") and any(article):
            yield "".join(article)
            article = []
        article.append(line if line.endswith("\n") or not line else line + "\n")
    if any(article):
        yield "".join(article)


def _stdlib(split: str) -> Iterator[str]:
    if split not in ("train", *VALIDATION_SPLITS):
        raise ValueError(f"split {split!r} of {STDLIB} is unknown; it has train and validation")
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root).as_posix()
        if "site-packages" in relative or "dist-packages" in relative:
            continue
        text = file.read_bytes().decode("utf-8", errors="ignore")
        digest = hashlib.sha256(text.encode()).digest()
        held_out = int.from_bytes(digest[:8], "little") % STDLIB_HELD_OUT == 0
        if text and held_out == (split != "train"):
            yield text


def _saved(path: Path, split: str):
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(str(path))
    if not isinstance(saved, DatasetDict):
        saved = {"train": saved}
    if split not in saved:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(saved)}")
    return saved[split]


def _files(path: Path, split: str, config: str | None) -> Iterator[str | list[int]]:
    if path.is_file():
        files = [path] if split == "train" else []
        have = "train"
    else:
        root = path / config if config and (path / config).is_dir() else path
        found = sorted(file for file in root.rglob("*") if file.suffix in LOADERS)
        named = {file: _split_of(file, root) for file in found}
        files = [file for file in found if named[file] == split]
        have = ", ".join(sorted(set(named.values()))) or "no .txt, .jsonl, .json or .parquet file"
    if path.is_file() and path.suffix not in LOADERS:
        raise ValueError(f"{path} is none of {', '.join(LOADERS)}")
    if not files:
        raise ValueError(f"{path} has no split {split!r}; it has {have}")
    return itertools.chain.from_iterable(_file(file) for file in files)


def _split_of(file: Path, root: Path) -> str:
    """The split that a file's name or folder says, `train` if none: train-00000-of-00002.parquet, test/a.txt."""
    for part in reversed(file.relative_to(root).parts):
        word = part.split(".")[0].split("-")[0]
        if word in ("train", *VALIDATION_SPLITS):
            return word
    return "train"


def _file(file: Path) -> Iterator[str | list[int]]:
    if file.suffix == ".txt":
        text = file.read_text(encoding="utf-8")
        return iter([text] if text else [])
    from datasets import load_dataset

    return _column(load_dataset(LOADERS[file.suffix], data_files=str(file), split="train", streaming=True), str(file))


def _hub(name: str, config: str | None, split: str) -> Iterator[str | list[int]]:
    from datasets import load_dataset

    full_name = "Salesforce/wikitext" if name == "wikitext" else name
    try:
        rows = load_dataset(full_name, config, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load {name} ({config or 'default'}, {split}) from disk or hub: {error}") from error
    return _column(rows, name)


def _column(rows, source: str) -> Iterator[str | list[int]]:
    column = None
    for row in rows:
        if column is None:
            column = next((key for key in ("input_ids", "text") if key in row), None)
            if column is None:
                raise ValueError(f"{source} has neither a column input_ids nor text, only {', '.join(row)}")
        yield row[column]


# ------------------------------------------------------------------------------------------------------ files of tokens


@dataclass(frozen=True)
class Tokens:
    """One split as a flat array of ids, and where its documents start."""

    ids: np.ndarray  # (tokens,) uint16 or uint32, perhaps a memory map
    starts: np.ndarray  # (documents,) int64
    eot_id: int
    largest: int  # id

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError if an id has no row in a vocabulary of that size."""
        if self.largest >= vocab_size:
            raise ValueError(f"the data hold the id {self.largest}, outside the model's vocabulary of {vocab_size}")


def load_tokens(source: str | os.PathLike, split: str, tokenizer: Tokenizer | None) -> Tokens:
    """Tokens of a split, from the cache if the source has not changed, else encoded now.

    The cache is $MAMBA2_CACHE, by default ~/.cache/mamba2. Encoding streams: memory does not grow with the source.
    Raises ValueError when the split is empty, or holds text and `tokenizer` is None.
    """
    cache = Path(os.environ.get("MAMBA2_CACHE") or Path.home() / ".cache" / "mamba2")
    folder = cache / _fingerprint(str(source), split, tokenizer)
    if not folder.exists():
        documents = read_documents(source, split)
        with atomic_folder(folder) as temporary:
            _write_tokens(temporary, documents, f"{source} ({split})", tokenizer)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    ids = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
    return Tokens(ids, np.load(folder / "starts.npy"), meta["eot_id"], meta["largest"])


def load_validation(source: str | os.PathLike, tokenizer: Tokenizer | None) -> Tokens | None:
    """Tokens of the first of the splits validation, val, test that the source has, or None."""
    for split in VALIDATION_SPLITS:
        try:
            return load_tokens(source, split, tokenizer)
        except ValueError as error:
            if "has no split" not in str(error):
                raise
    return None


def _write_tokens(folder: Path, documents: Iterator, name: str, tokenizer: Tokenizer | None) -> None:
    # ids above 65 535 exist in none of the built-in vocabularies; what other tokenizers or ready ids need is not known
    wide = tokenizer is None or tokenizer.vocab_size > 2**16
    dtype = "<u4" if wide else "<u2"
    eot_id = 0 if tokenizer is None else tokenizer.eot_id
    starts, position, largest = [], 0, 0
    with open(folder / "tokens.bin", "wb") as file:
        for document in tqdm(documents, desc=f"encoding {name}", unit=" documents", disable=None):
            if isinstance(document, str):
                if tokenizer is None:
                    raise ValueError(f"{name} is text, and the model carries no tokenizer to encode it with")
                document = tokenizer.encode(document)
            if len(document) == 0:
                continue
            ids = np.asarray(document, dtype=np.int64)
            if ids.min() < 0 or ids.max() >= 2 ** (32 if wide else 16):
                raise ValueError(f"{name} holds ids from {ids.min()} to {ids.max()}, outside the vocabulary")
            if ids[-1] != eot_id:
                ids = np.append(ids, eot_id)
            starts.append(position)
            position += len(ids)
            largest = max(largest, int(ids.max()))
            file.write(ids.astype(dtype).tobytes())
    if not starts:
        raise ValueError(f"{name} is empty: not one document with text or ids")
    np.save(folder / "starts.npy", np.asarray(starts, dtype=np.int64))
    meta = {"source": name, "tokens": position, "documents": len(starts), "dtype": dtype}
    meta |= {"eot_id": eot_id, "largest": largest, "tokenizer": None if tokenizer is None else tokenizer.identity}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _fingerprint(source: str, split: str, tokenizer: Tokenizer | None) -> str:
    """Name of a cache entry: changes with the source's files (path, size, time of change), the split, the tokenizer."""
    parts = [source, split, "none" if tokenizer is None else tokenizer.identity]
    path = Path(source)
    if source == STDLIB:
        parts.append(sys.version)
    elif path.exists():
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        parts += [f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


# -------------------------------------------------------------------------------------------------------------- batches


class Windows:
    """Windows of T + 1 tokens every T tokens. The last one is filled up, and its filling does not count.

    Which windows a step sees depends on (seed, step) alone: sample number step · batch + k, a permutation per epoch.
    """

    def __init__(self, tokens: Tokens, length: int, reset: bool = True):
        """`length` is T. `reset`: state and convolution restart at each document."""
        self.tokens, self.length, self.reset = tokens, length, reset
        self._permutation: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        return max(1, -(-(len(self.tokens.ids) - 1) // self.length))

    def indices(self, seed: int, step: int, batch: int) -> list[int]:
        """The windows of a step, in order."""
        samples = range(step * batch, (step + 1) * batch)
        return [self._shuffled(seed, i // len(self))[i % len(self)] for i in samples]

    def _shuffled(self, seed: int, epoch: int) -> np.ndarray:
        if self._permutation is None or self._permutation[0] != (seed, epoch):
            order = np.random.default_rng([seed, epoch]).permutation(len(self))
            self._permutation = (seed, epoch), order
        return self._permutation[1]

    def batch(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Inputs (k, T), targets (k, T) with -100 where nothing counts, both int64; seq_idx (k, T) int32 or None."""
        T = self.length
        window = np.full((len(indices), T + 1), self.tokens.eot_id, dtype=np.int64)
        seq_idx = np.zeros((len(indices), T), dtype=np.int32)
        counted = np.zeros((len(indices), T), dtype=bool)
        for row, index in enumerate(indices):
            start = int(index) * T
            ids = self.tokens.ids[start : start + T + 1]
            window[row, : len(ids)] = ids
            counted[row, : len(ids) - 1] = True
            if self.reset:
                positions = np.arange(start, start + T)
                seq_idx[row] = np.searchsorted(self.tokens.starts, positions, side="right")
        window = torch.from_numpy(window)
        targets = window[:, 1:].masked_fill(~torch.from_numpy(counted), IGNORE_INDEX)
        return window[:, :-1], targets, torch.from_numpy(seq_idx) if self.reset else None
