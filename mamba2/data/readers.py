"""Files of text, JSON and parquet to documents.

Each reader takes a file and a place in it, 0 being the beginning, and yields items with that file's places and bytes.
Text is UTF-8; a byte order mark at the beginning of a file is no text. Of a table the column `input_ids` is read, lists
of integers, or else `text`. A cell that is null counts as an empty document.
"""

import codecs
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

COLUMNS = ("input_ids", "text")
WANTED = {"input_ids": "a list of integers", "text": "text"}

TEXT_PIECE = 2**22  # bytes of a text file that are one item
ROWS = 128  # of a table that are read at a time

Place = tuple[int, int]  # number of a file, and the byte or row in it
Document = str | np.ndarray


class Item(NamedTuple):
    """A document, or a piece of one, and where the source goes on."""

    document: Document
    after: Place
    read: int  # so far, in the units of Source.total
    ends: bool = True  # False: the document goes on in the next item


def kind_of(file: Path) -> str | None:
    """The key of READERS for a file, by its ending before .gz or .zst."""
    name = file.name.removesuffix(".gz").removesuffix(".zst")
    kind = Path(name).suffix
    return kind if kind in READERS else None


def read_file(file: Path, start: int) -> Iterator[Item]:
    """The items of a file after the place `start`.

    Raises ValueError naming the file and the line, row or column when it is not what its name says.
    """
    refuse_pointer(file)
    return READERS[kind_of(file)](file, start)


def refuse_pointer(file: Path) -> None:
    """Raises ValueError if a clone holds only what stands for a large file."""
    with open(file, "rb") as opened:
        if opened.read(24) == b"version https://git-lfs.":
            raise ValueError(f"{file} is a pointer of Git LFS and not the file itself, which `git lfs pull` fetches")


def before(file: Path, place: int) -> str:
    """The document of a file after which `place` stands, in words."""
    if kind_of(file) == ".parquet" or place < 0:
        return f"{file}, row {abs(place) - 1}"
    return f"{file}, what ends at byte {place}"


def _text(file: Path, start: int) -> Iterator[Item]:
    """The file is one document. A large one comes in pieces, cut between a letter or digit and a line break: there the
    splitting rules of all byte-level tokenizers begin anew, so the ids are those of the whole."""
    with _open(file, start) as (stream, bytes_read):
        begins = start == 0
        start = start or _skip_mark(stream, file)
        piece, searched, more = b"", 0, True
        while more:
            block = stream.read(TEXT_PIECE)
            more, piece = len(block) == TEXT_PIECE, piece + block
            cut = _last_cut(piece, searched) if more else len(piece)
            searched = len(piece)
            if cut == 0 and (more or not begins):
                continue
            head, piece, searched = piece[:cut], piece[cut:], 0
            start = max(1, start + len(head))  # of an empty file too, the place after it is not that before it
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
    """A row per line; or one JSON array of rows, which is read whole, and whose places are row numbers below 0. The
    first row says which column is read."""
    column = _first_column(file) if start > 0 else None
    place = max(start, 0)
    with _open(file, place) as (stream, bytes_read):
        place = place or _skip_mark(stream, file)
        for line in stream:
            place += len(line)
            if not line.strip():
                continue
            if column is None and line.lstrip().startswith(b"["):
                rows = _parsed(line + stream.read(), str(file))
                for number in range(-start, len(rows)):
                    where = f"{file}, row {number}"
                    column = column or _row_column(rows[0], f"{file}, row 0")
                    yield Item(_cell(rows[number], column, where), (0, -number - 1), bytes_read())
                return
            where = f"{file}, the line that ends at byte {place}"
            row = _parsed(line, where)
            column = column or _row_column(row, where)
            yield Item(_cell(row, column, where), (0, place), bytes_read())


def _first_column(file: Path) -> str:
    """The column of a file of lines that was begun before."""
    with _open(file, 0) as (stream, _):
        _skip_mark(stream, file)
        return _row_column(_parsed(next(line for line in stream if line.strip()), str(file)), str(file))


def _parsed(text: bytes, where: str):
    try:
        return json.loads(text.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not a row: it is nested too deep") from error


def _row_column(row, where: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row is a JSON object with the column text or input_ids, not {_found(row)}")
    return find_column(row, where)


def _cell(row, column: str, where: str) -> Document:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row is a JSON object with the column {column}, not {_found(row)}")
    if column not in row:
        raise ValueError(f"{where}: the row has no column {column}, which the first row of the file has")
    return document(row[column], column, where)


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


# --------------------------------------------------------------------------------------------------------------- cells


def find_column(names: Iterable[str], where: str | os.PathLike) -> str:
    """The column of documents among `names`. Raises ValueError if there is none."""
    for column in COLUMNS:
        if column in names:
            return column
    raise ValueError(f"{where} has neither a column input_ids nor text, only {', '.join(names)}")


def document(value, column: str, where: str) -> Document:
    """A cell in Python's types as a document. Raises ValueError if it is none."""
    if value is None:
        return ""
    if column == "text" and isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"{value[error.start]!r}, half of a surrogate pair, which UTF-8 cannot hold"
            raise ValueError(f"{where}: the column text holds {half}") from error
        return value
    if column == "input_ids" and isinstance(value, list) and set(map(type, value)) <= {int}:
        try:
            return np.array(value, dtype=np.int64)
        except OverflowError as error:
            raise ValueError(f"{where}: the column input_ids holds an id that takes more than 64 bits") from error
    raise ValueError(f"{where}: the column {column} holds {_found(value)} instead of {WANTED[column]}")


def _found(value) -> str:
    """What a value is, in words."""
    if value is None:
        return "null"
    kind = type(value).__name__
    if isinstance(value, list) and value:
        return f"a list of {', '.join(sorted({'null' if x is None else type(x).__name__ for x in value}))}"
    return f"{kind} {value!r}" if isinstance(value, int | float) else kind


def cells(column, name: str, where: str | os.PathLike, row: int) -> list[Document]:
    """The documents of the Arrow array `column`, which begins at `row` of the table `where`.

    Raises ValueError if the column called `name` holds something else than documents.
    """
    import pyarrow
    from pyarrow import types

    if isinstance(column, pyarrow.ChunkedArray):
        column = column.combine_chunks()
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if types.is_null(kind):
        return [""] * len(column)
    if name == "text" and (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        try:
            return [text or "" for text in column.to_pylist()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}, rows {row} to {row + len(column) - 1}: text is not UTF-8: {error}") from error
    if name == "input_ids" and _is_list(kind) and (types.is_integer(kind.value_type) or types.is_null(kind.value_type)):
        return _lists(column, where, row)
    raise ValueError(f"{where}: the column {name} holds {kind} instead of {WANTED[name]}")


def _is_list(kind) -> bool:
    from pyarrow import types

    tests = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return any(test(kind) for test in tests)


def _lists(column, where: str | os.PathLike, row: int) -> list[np.ndarray]:
    import pyarrow
    import pyarrow.compute

    lengths = pyarrow.compute.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    ids = column.flatten()
    if ids.null_count:
        bad = next(number for number, cell in enumerate(column.to_pylist(), row) if cell and None in cell)
        raise ValueError(f"{where}, row {bad}: the column input_ids holds a list with null in it")
    if pyarrow.types.is_uint64(ids.type) and len(ids) and pyarrow.compute.max(ids).as_py() >= 2**63:
        raise ValueError(f"{where}: the column input_ids holds an id that takes more than 64 bits")
    documents = np.split(ids.to_numpy(zero_copy_only=False), np.cumsum(lengths)[:-1])
    return documents[: len(column)]  # of no rows, too, np.split makes one array
