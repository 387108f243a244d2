"""Files of text, JSON and parquet to documents.

Each reader takes a file and a place in it, 0 being the beginning, and yields items with places and byte counts of that
file. Text is UTF-8; a byte order mark at the beginning of a file is dropped. Of a table the column `input_ids` is read
(lists of integers), or else `text`. A null cell counts as an empty document.
"""

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

COLUMNS = {"input_ids": "a list of integers", "text": "text"}  # the columns of documents, and what a cell holds

TEXT_PIECE = 2**22  # bytes of a text file that are read at a time
# Matches up to the last line break that follows a letter or digit, or nothing if there is none.
LAST_CUT = re.compile(rb"(?:.*[0-9A-Za-z](?=\n))?", re.DOTALL)
ROWS = 128  # rows of a table that are read at a time

Place = tuple[int, int]  # number of a file in the source, and byte or row in that file
Document = str | np.ndarray  # text, or ids (tokens,) int64


class Item(NamedTuple):
    """A document, or a piece of a long one, and the place after it."""

    document: Document
    after: Place
    read: int  # how much of the source was read up to here, in the unit of Source.total
    ends: bool = True  # False: the document continues in the next item


def kind_of(file: Path) -> str | None:
    """The key of READERS for a file, by its ending before .gz or .zst; None if there is no reader."""
    kind = Path(file.name.removesuffix(".gz").removesuffix(".zst")).suffix
    return kind if kind in READERS else None


def read_file(file: Path, start: int) -> Iterator[Item]:
    """The items of a file after the place `start`.

    Raises ValueError naming the file and the line, row or column when the content does not fit the file's ending.
    """
    refuse_pointer(file)
    return READERS[kind_of(file)](file, start)


def refuse_pointer(file: Path) -> None:
    """Raises ValueError if a git clone holds only the LFS pointer of the file."""
    with open(file, "rb") as opened:
        if opened.read(24) == b"version https://git-lfs.":
            raise ValueError(f"{file} is a pointer of Git LFS and not the file itself, which `git lfs pull` fetches")


def before(file: Path, place: int) -> str:
    """In words, the document of a file that ends at `place`."""
    if kind_of(file) == ".parquet" or place < 0:
        return f"{file}, row {abs(place) - 1}"
    return f"{file}, what ends at byte {place}"


def _text(file: Path, start: int) -> Iterator[Item]:
    """The file is one document. A large one comes in pieces, cut between a letter or digit and a line break: the
    splitting rules of all byte-level tokenizers start a new word there, so the ids are those of the whole file."""
    with _open(file, start) as (stream, bytes_read):
        begins = start == 0
        start = start or _skip_mark(stream, file)
        piece, more = b"", True
        while more:
            block = stream.read(TEXT_PIECE)
            more = len(block) == TEXT_PIECE
            cut = LAST_CUT.match(block).end() if more else len(block)
            if more and cut == 0:
                piece += block
                continue
            head, piece = piece + block[:cut], block[cut:]
            if not head and not begins:
                return
            start = max(1, start + len(head))  # the place after an empty file differs from the one before it
            try:
                text = head.decode("utf-8")
            except UnicodeDecodeError as error:
                where = start - len(head) + error.start
                raise ValueError(f"{file} is not UTF-8: byte {where} is {head[error.start]:#04x}") from error
            yield Item(text.replace("\r\n", "\n").replace("\r", "\n"), (0, start), bytes_read(), ends=not more)


def _json(file: Path, start: int) -> Iterator[Item]:
    """One row per line, with places in bytes; or one JSON array of rows, which is read whole, with minus the number of
    rows as places. The first row decides which column is read."""
    column = None
    if start > 0:
        with _open(file, 0) as (stream, _):
            _skip_mark(stream, file)
            first = next(line for line in stream if line.strip())
            column = find_column(_parsed(first, str(file)), file)
    place = max(start, 0)
    with _open(file, place) as (stream, bytes_read):
        place = place or _skip_mark(stream, file)
        for line in stream:
            place += len(line)
            if not line.strip():
                continue
            if column is None and line.lstrip().startswith(b"["):
                for number, row in enumerate(_parsed(line + stream.read(), str(file))):
                    column, cell = _cell(row, column, f"{file}, row {number}")
                    if number >= -start:
                        yield Item(cell, (0, -number - 1), bytes_read())
                return
            where = f"{file}, the line that ends at byte {place}"
            column, cell = _cell(_parsed(line, where), column, where)
            yield Item(cell, (0, place), bytes_read())


def _parsed(text: bytes, where: str):
    try:
        return json.loads(text.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not a row: it is nested too deep") from error


def _cell(row, column: str | None, where: str) -> tuple[str, Document]:
    """The column that is read and the document in it. `column` is None for the first row of a file.

    Raises ValueError if `row` is not an object with such a column, or the cell is not a document.
    """
    if not isinstance(row, dict):
        wanted = column or "text or input_ids"
        raise ValueError(f"{where}: a row is a JSON object with the column {wanted}, not {_found(row)}")
    column = column or find_column(row, where)
    if column not in row:
        raise ValueError(f"{where}: the row has no column {column}, which the first row of the file has")
    value = row[column]
    if value is None:
        return column, ""
    if column == "text" and isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"{value[error.start]!r}, half of a surrogate pair, which UTF-8 cannot hold"
            raise ValueError(f"{where}: the column text holds {half}") from error
        return column, value
    if column == "input_ids" and isinstance(value, list) and set(map(type, value)) <= {int}:
        try:
            return column, np.array(value, dtype=np.int64)
        except OverflowError as error:
            raise ValueError(f"{where}: the column input_ids holds an id that takes more than 64 bits") from error
    raise ValueError(f"{where}: the column {column} holds {_found(value)} instead of {COLUMNS[column]}")


def _found(value) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    kind = type(value).__name__
    if isinstance(value, list) and value:
        return f"a list of {', '.join(sorted({'null' if x is None else type(x).__name__ for x in value}))}"
    return f"{kind} {value!r}" if isinstance(value, int | float) else kind


def _parquet(file: Path, start: int) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    size, row = file.stat().st_size, 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            column, rows = find_column(table.schema_arrow.names, file), table.metadata.num_rows
            group = 0
            while group < table.num_row_groups and row + table.metadata.row_group(group).num_rows <= start:
                row += table.metadata.row_group(group).num_rows
                group += 1
            groups = range(group, table.num_row_groups)
            for batch in table.iter_batches(ROWS, row_groups=groups, columns=[column]):
                for cell in cells(batch.column(0), column, file, row):
                    row += 1
                    if row > start:
                        yield Item(cell, (0, row), size * row // rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a parquet file, or cut short or damaged after row {row}: {error}") from error


READERS = {".txt": _text, ".jsonl": _json, ".json": _json, ".parquet": _parquet}


@contextmanager
def _open(file: Path, start: int) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """A file from byte `start` on, unpacked if it ends in .gz or .zst; and a function for the bytes read of it."""
    with open(file, "rb") as raw:
        try:
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
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{file} cannot be read, is cut short or damaged: {error}") from error


def _skip_mark(stream: BinaryIO, file: Path) -> int:
    """Pass over a byte order mark at the beginning; the bytes that it has. Raises ValueError if it is of UTF-16."""
    beginning = stream.peek(3)[:3]
    if beginning == codecs.BOM_UTF8:
        return len(stream.read(3))
    if beginning[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise ValueError(f"{file} is not UTF-8: byte 0 is {beginning[0]:#04x}, a mark of UTF-16 or UTF-32")
    return 0


# ------------------------------------------------------------------------------------------------------------- columns


def find_column(names: Iterable[str], where: str | os.PathLike) -> str:
    """The column of documents among `names`. Raises ValueError if there is none."""
    for column in COLUMNS:
        if column in names:
            return column
    raise ValueError(f"{where} has neither a column input_ids nor text, only {', '.join(names)}")


def cells(column, name: str, where: str | os.PathLike, row: int) -> list[Document]:
    """The documents of the Arrow array `column`, which begins at `row` of the table `where`.

    Raises ValueError if the column called `name` does not hold documents.
    """
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_null(kind):
        return [""] * len(column)
    if name == "text" and kind in (pa.string(), pa.large_string(), pa.string_view()):
        try:
            return [text or "" for text in column.to_pylist()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}, rows {row} to {row + len(column) - 1}: text is not UTF-8: {error}") from error
    lists = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType, pa.LargeListViewType)
    if (
        name == "input_ids"
        and isinstance(kind, lists)
        and (pa.types.is_integer(kind.value_type) or pa.types.is_null(kind.value_type))
    ):
        return [_ids(cell.values, where, number) for number, cell in enumerate(column, row)]
    raise ValueError(f"{where}: the column {name} holds {kind} instead of {COLUMNS[name]}")


def _ids(values, where: str | os.PathLike, row: int) -> np.ndarray:
    """One list of an Arrow column, None where it is null: (tokens,) int64."""
    import pyarrow

    if values is None:
        return np.empty(0, np.int64)
    if values.null_count:
        raise ValueError(f"{where}, row {row}: the column input_ids holds a list with null in it")
    try:
        return values.cast(pyarrow.int64()).to_numpy()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{where}: the column input_ids holds an id that takes more than 64 bits") from error
