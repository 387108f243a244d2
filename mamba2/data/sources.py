"""What gives documents: files, folders, saved data sets, the hub, the standard library.

Every source is a sequence of items that can be entered at any place it named before, so that preparing tokens can go on
after an interruption without reading again what is done.
"""

import gzip
import hashlib
import io
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

STDLIB = "stdlib"
VALIDATION_SPLITS = ("validation", "val", "test")
COLUMNS = ("input_ids", "text")

# Of the standard library one file in 20 is held out, chosen by its content: copies of a file fall on the same side.
STDLIB_HELD_OUT = 20

TEXT_PIECE = 2**22  # bytes of a text file that are one item
ROWS = 128  # of a table that are read at a time

Place = tuple[int, int]  # number of a file, and the byte or row in it
Document = str | np.ndarray | list[int]


class Item(NamedTuple):
    """A document, or a piece of one, and where the source goes on."""

    document: Document
    after: Place
    read: int  # so far, in the units of Source.total
    ends: bool = True  # False: the document goes on in the next item


@dataclass(frozen=True)
class Source:
    """One split of a source. `items(place)` gives what comes after `place`, (0, 0) being the beginning."""

    name: str
    split: str
    revision: str  # changes with the content: commit of a hub data set, hash of the files' paths, sizes and times
    total: int | None  # bytes or documents, None if not known
    unit: str  # "B" or " documents"
    items: Callable[[Place], Iterator[Item]]


def read_documents(source: str | os.PathLike, split: str, config: str | None = None) -> Iterator[Document]:
    """Documents of one split, as text or as ids.

    Raises FileNotFoundError for a source that is not there, ValueError for a split or a column that is not.
    """
    return _whole(open_source(source, split, config).items((0, 0)))


def _whole(items: Iterator[Item]) -> Iterator[Document]:
    pieces: list[str] = []
    for item in items:
        if item.ends and not pieces:
            yield item.document
            continue
        pieces.append(item.document)
        if item.ends:
            yield "".join(pieces)
            pieces = []


def open_source(
    source: str | os.PathLike, split: str, config: str | None = None, revision: str | None = None
) -> Source:
    """One split of a source; see the package for what a source can be. `revision`: commit, branch or tag on the hub.

    Raises FileNotFoundError for a source that is not there, ValueError for a split or a column that is not.
    """
    source = str(source)
    path = Path(source)
    if revision is not None and (source == STDLIB or path.exists()):
        raise ValueError(f"{source} lies on this machine and has no revision {revision!r}; data sets of the hub have")
    if source == STDLIB:
        return _stdlib(split)
    if path.is_dir() and any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        return _saved(path, split)
    if path.exists():
        return _files(path, split, config)
    if path.is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise FileNotFoundError(f"no data at {source}")
    name, _, suffix = source.partition(":")
    return _hub(name, config or suffix or None, split, revision)


def wikitext_articles(lines: Iterator[str]) -> Iterator[list[str]]:
    """The lines of each article of WikiText: one begins at a heading of the first level, ` = Title = `.

    A line that is not empty ends with a line break. Lines before the first heading belong to the first article.
    """
    article: list[str] = []
    for line in lines:
        heading = line.strip()
        if heading.startswith("= ") and heading.endswith(" =") and not heading.startswith("= =") and any(article):
            yield article
            article = []
        article.append(line if line.endswith("\n") or not line else line + "\n")
    if any(article):
        yield article


def fingerprint(source: str | os.PathLike) -> str:
    """Hash of the path, size and time of change of every file behind a source on this machine."""
    path = Path(source)
    parts = [str(source)]
    if str(source) == STDLIB:
        parts.append(sys.version)
    elif path.exists():
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        parts += [f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------ the kinds


def _stdlib(split: str) -> Source:
    if split not in ("train", *VALIDATION_SPLITS):
        raise ValueError(f"split {split!r} of {STDLIB} is unknown; it has train and validation")
    root = Path(sysconfig.get_paths()["stdlib"])
    installed = ("site-packages", "dist-packages")
    files = [file for file in sorted(root.rglob("*.py")) if not any(part in file.parts for part in installed)]
    sizes = [file.stat().st_size for file in files]

    def items(place: Place) -> Iterator[Item]:
        read = sum(sizes[: place[0]])
        for number in range(place[0], len(files)):
            text = files[number].read_bytes().decode("utf-8", errors="ignore")
            read += sizes[number]
            digest = hashlib.sha256(text.encode()).digest()
            held_out = int.from_bytes(digest[:8], "little") % STDLIB_HELD_OUT == 0
            if text and held_out == (split != "train"):
                yield Item(text, (number + 1, 0), read)

    return Source(STDLIB, split, f"Python {sys.version}", sum(sizes), "B", items)


def _saved(path: Path, split: str) -> Source:
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(str(path))
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    if split not in splits:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(splits)}")
    rows = splits[split].with_format("arrow")
    column = _column(rows.column_names, path)

    def items(place: Place) -> Iterator[Item]:
        for start in range(place[1], len(rows), ROWS):
            cells = _cells(rows[start : start + ROWS].column(column))
            yield from (Item(cell, (0, row), row) for row, cell in enumerate(cells, start + 1))

    return Source(str(path), split, fingerprint(path), len(rows), " documents", items)


def _hub(name: str, config: str | None, split: str, revision: str | None) -> Source:
    from datasets import load_dataset_builder

    full_name = "Salesforce/wikitext" if name == "wikitext" else name
    try:
        builder = load_dataset_builder(full_name, config, revision=revision)
        splits = builder.as_streaming_dataset()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load {name} ({config or 'default'}) from disk or hub: {error}") from error
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(splits)}")
    known = (builder.info.splits or {}).get(split)

    def items(place: Place) -> Iterator[Item]:
        column, number = None, place[1]
        for row in splits[split].skip(number):
            column = column or _column(row, name)
            number += 1
            yield Item(_cell(row[column], f"{name}, row {number}"), (0, number), number)

    total = known.num_examples if known is not None else None
    label = full_name if config is None else f"{full_name}:{config}"
    return Source(label, split, str(builder.hash), total, " documents", items)


def _files(path: Path, split: str, config: str | None) -> Source:
    if path.is_file():
        if _kind(path) is None:
            raise ValueError(f"{path} is none of {', '.join(READERS)}")
        named = {path: "train"}
    else:
        root = path / config if config and (path / config).is_dir() else path
        named = {file: _split_of(file, root) for file in sorted(root.rglob("*")) if file.is_file() and _kind(file)}
    files = [file for file, its_split in named.items() if its_split == split]
    if not files:
        have = ", ".join(sorted(set(named.values()))) or f"no {', '.join(READERS)} file"
        raise ValueError(f"{path} has no split {split!r}; it has {have}")
    sizes = [file.stat().st_size for file in files]

    def items(place: Place) -> Iterator[Item]:
        number, inside = place
        while number < len(files):
            before = sum(sizes[:number])
            for item in READERS[_kind(files[number])](files[number], inside):
                yield item._replace(after=(number, item.after[1]), read=before + item.read)
            number, inside = number + 1, 0

    return Source(str(path), split, fingerprint(path), sum(sizes), "B", items)


def _kind(file: Path) -> str | None:
    """The key of READERS for a file, by its ending before .gz or .zst."""
    name = file.name.removesuffix(".gz").removesuffix(".zst")
    kind = Path(name).suffix
    return kind if kind in READERS else None


def _split_of(file: Path, root: Path) -> str:
    """The split that a file's name or folder says, `train` if none: train-00000-of-00002.parquet, test/a.txt."""
    for part in reversed(file.relative_to(root).parts):
        word = part.split(".")[0].split("-")[0]
        if word in ("train", *VALIDATION_SPLITS):
            return word
    return "train"


# ---------------------------------------------------------------------------------------------------- readers of a file
# Each takes a file and the place in it, and yields items with that file's place and bytes.


def _text(file: Path, start: int) -> Iterator[Item]:
    """The file is one document. A large one comes in pieces, cut between a letter or digit and a line break: there the
    splitting rules of all byte-level tokenizers begin anew, so the ids are those of the whole."""
    with _open(file, start) as (stream, bytes_read):
        piece, searched, more = b"", 0, True
        while more:
            block = stream.read(TEXT_PIECE)
            more, piece = len(block) == TEXT_PIECE, piece + block
            cut = _last_cut(piece, searched) if more else len(piece)
            searched = len(piece)
            if cut == 0:
                continue
            head, piece, searched = piece[:cut], piece[cut:], 0
            start += len(head)
            try:
                text = head.decode("utf-8")
            except UnicodeDecodeError as error:
                where = start - len(head) + error.start
                raise ValueError(f"{file} is not UTF-8: byte {where} is {head[error.start]:#04x}") from error
            yield Item(text.replace("\r\n", "\n").replace("\r", "\n"), (0, start), bytes_read(), ends=not more)


def _last_cut(piece: bytes, searched: int) -> int:
    at = piece.rfind(b"\n", max(1, searched))
    while at > 0 and not piece[at - 1 : at].isalnum():
        at = piece.rfind(b"\n", max(1, searched), at)
    return max(at, 0)


def _json(file: Path, start: int) -> Iterator[Item]:
    """A row per line; or one JSON array of rows, which is read whole, and whose places are row numbers below 0."""
    column, place = None, max(start, 0)
    with _open(file, place) as (stream, bytes_read):
        for line in stream:
            if place == 0 and line.lstrip().startswith(b"["):
                rows = _parsed(line + stream.read(), str(file), list)
                for number in range(-start, len(rows)):
                    column = column or _column(rows[0], file)
                    cell = _cell(rows[number].get(column), f"{file}, row {number}")
                    yield Item(cell, (0, -number - 1), bytes_read())
                return
            place += len(line)
            if not line.strip():
                continue
            where = f"{file}, the line that ends at byte {place}"
            row = _parsed(line, where)
            column = column or _column(row, file)
            yield Item(_cell(row.get(column), where), (0, place), bytes_read())


def _parsed(text: bytes, where: str, kind: type = dict):
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{where}: a JSON {kind.__name__} is wanted, not {type(value).__name__}")
    return value


def _parquet(file: Path, start: int) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    size = file.stat().st_size
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} is not a parquet file, or cut short: {error}") from error
    with table:
        column, rows = _column(table.schema_arrow.names, file), table.metadata.num_rows
        group, row = 0, 0
        while group < table.num_row_groups and row + table.metadata.row_group(group).num_rows <= start:
            row += table.metadata.row_group(group).num_rows
            group += 1
        groups = range(group, table.num_row_groups)
        for batch in table.iter_batches(ROWS, row_groups=groups, columns=[column]):
            for cell in _cells(batch.column(0)):
                row += 1
                if row > start:
                    yield Item(cell, (0, row), size * row // rows)


READERS = {".txt": _text, ".jsonl": _json, ".json": _json, ".parquet": _parquet}


@contextmanager
def _open(file: Path, start: int) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """A file from byte `start` on, unpacked if it ends in .gz or .zst; and a function for the bytes read of it."""
    with open(file, "rb") as raw:
        if file.suffix == ".zst":
            import pyarrow

            with io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 2**20) as stream:
                while start > 0 and (block := stream.read(min(start, 2**20))):  # this stream cannot seek
                    start -= len(block)
                yield stream, raw.tell
        elif file.suffix == ".gz":
            with gzip.open(raw) as stream:
                stream.seek(start)
                yield stream, raw.tell
        else:
            raw.seek(start)
            yield raw, raw.tell


def _column(names, source: str | os.PathLike) -> str:
    for column in COLUMNS:
        if column in names:
            return column
    raise ValueError(f"{source} has neither a column input_ids nor text, only {', '.join(names)}")


def _cell(value, where: str) -> Document:
    """A row's document; a missing one (null) counts as empty."""
    if value is None:
        return ""
    if not isinstance(value, str | list):
        raise ValueError(f"{where}: {type(value).__name__} is neither text nor a list of ids")
    return value


def _cells(column) -> list[Document]:
    """The documents of an Arrow column."""
    import pyarrow
    import pyarrow.compute

    documents: list[Document] = []
    for chunk in column.chunks if isinstance(column, pyarrow.ChunkedArray) else [column]:
        if pyarrow.types.is_string(chunk.type) or pyarrow.types.is_large_string(chunk.type):
            documents += [text or "" for text in chunk.to_pylist()]
            continue
        lengths = pyarrow.compute.list_value_length(chunk).fill_null(0).to_numpy(zero_copy_only=False)
        ids = chunk.flatten().to_numpy(zero_copy_only=False)
        if not np.issubdtype(ids.dtype, np.integer) and len(ids):
            raise ValueError(f"the column holds lists of {chunk.type.value_type}, neither text nor lists of ids")
        documents += np.split(ids, np.cumsum(lengths)[:-1])
    return documents
