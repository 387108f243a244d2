"""Files of every encoding, shape and column type: read as `pyarrow` and `datasets` read them, or refused in a sentence
that names the file, the place and what was found there."""

import gzip
import json
import random
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq
import pytest

from mamba2.data import open_source, read_documents

BOM = b"\xef\xbb\xbf"


def read(file, content: bytes | None = None) -> list:
    if content is not None:
        file.write_bytes(content)
    return [text if isinstance(text, str) else text.tolist() for text in read_documents(file, "train")]


def after_each(file) -> list[list]:
    """For each document, those that come when reading goes on after it."""
    source = open_source(file, "train")
    return [[item.document for item in source.items(done.after)] for done in source.items((0, 0))]


def refused(file, content: bytes | None = None) -> str:
    with pytest.raises(ValueError) as error:
        read(file, content)
    assert type(error.value) is ValueError and str(file) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------- column types

TEXTS, IDS = ["one", None, "", "häß", "one"], [[1, 2], None, [], [3], [70000]]
TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
ID_TYPES = [pa.list_(kind) for kind in (pa.int32(), pa.int64(), pa.uint32(), pa.uint64())]
ID_TYPES += [pa.large_list(pa.int64()), pa.list_view(pa.int32()), pa.large_list_view(pa.int32())]


def table(file, column: str, array) -> object:
    pq.write_table(pa.table({"number": pa.nulls(len(array)), column: array}), file)
    return file


@pytest.mark.parametrize("kind", [*TEXT_TYPES, *ID_TYPES, pa.list_(pa.int16(), 2), pa.null()], ids=str)
def test_a_column_of_every_type_is_read(tmp_path, kind):
    column, values, empty = ("text", TEXTS, "") if kind in TEXT_TYPES else ("input_ids", IDS, [])
    if pa.types.is_fixed_size_list(kind):
        values = [[1, 2], None, [3, 4]]
    elif pa.types.is_null(kind):
        values, empty = [None] * 3, ""
        assert read(table(tmp_path / "b.parquet", "text", pa.nulls(3))) == ["", "", ""]
    file = table(tmp_path / "a.parquet", column, pa.array(values, kind))
    expected = [empty if value is None else value for value in values]
    assert read(file) == expected == [value or empty for value in pq.read_table(file)[column].to_pylist()]


OTHERS = [("text", pa.array([x])) for x in (b"bytes", 5, 1.5, True, ["a", "b"], [1, 2], {"a": "b"})]
OTHERS += [("input_ids", pa.array([x])) for x in ("text", 5, [1.5], [True, False], ["a"], [[1], [2]])]
OTHERS += [("input_ids", pa.array([[]], pa.list_(pa.float64())))]


@pytest.mark.parametrize(("column", "array"), OTHERS, ids=lambda x: x if isinstance(x, str) else str(x.type))
def test_a_column_of_another_type_is_refused_by_name_and_type(tmp_path, column, array):
    message = refused(table(tmp_path / "a.parquet", column, array))
    found = pq.read_table(tmp_path / "a.parquet")[column].type
    assert message.startswith(f"{tmp_path / 'a.parquet'}: the column {column} holds {found} instead of ")
    datasets.Dataset(pa.table({column: array})).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=f"saved: the column {column} holds "):
        read(tmp_path / "saved")


def test_a_table_of_other_columns_is_refused(tmp_path):
    rows = datasets.Dataset.from_dict({"body": ["x"]})
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "a.parquet")
    for source in ("saved", "a.parquet"):
        assert refused(tmp_path / source).endswith("has neither a column input_ids nor text, only body")


def test_a_null_inside_a_list_and_an_id_beyond_64_bits_are_refused(tmp_path):
    for rows, message in (
        (pa.array([[1]] * 200 + [[2, None]]), "row 200: the column input_ids holds a list with null"),
        (pa.array([[2**64 - 1]], pa.list_(pa.uint64())), "more than 64 bits"),
    ):
        assert message in refused(table(tmp_path / "a.parquet", "input_ids", rows))
    assert "more than 64 bits" in refused(tmp_path / "a.jsonl", b'{"input_ids": [%d]}' % 2**63)
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 1], "<i4").tobytes()), pa.py_buffer(b"\xff"))
    assert "rows 0 to 0: text is not UTF-8" in refused(table(tmp_path / "a.parquet", "text", bad))


def test_a_damaged_parquet_file_is_named(tmp_path):
    file = table(tmp_path / "a.parquet", "text", pa.array([str(i) * 20 for i in range(2000)]))
    content = bytearray(file.read_bytes())
    for cut in (3, 100, len(content) - 1):
        assert "is not a parquet file, or cut short or damaged" in refused(file, bytes(content[:cut]))
    content[200:600] = bytes(400)
    assert "damaged" in refused(file, bytes(content))


# -------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('["a", "b"]', "row 0: a row is a JSON object with the column text or input_ids, not str"),
        ("[null]", "row 0: a row is a JSON object with the column text or input_ids, not null"),
        ('[{"text": "a"}, null]', "row 1: a row is a JSON object with the column text, not null"),
        ('[{"text": "a"}, ["b"]]', "row 1: a row is a JSON object with the column text, not a list of str"),
        ('{"text": "a"}\n"b"\n', "the line that ends at byte 18: a row is a JSON object with the column text, not str"),
        ("5", "the line that ends at byte 1: a row is a JSON object with the column text or input_ids, not int 5"),
        ('{"text": ["a"]}', "the line that ends at byte 15: the column text holds a list of str instead of text"),
        ('{"text": [1]}', "the column text holds a list of int instead of text"),
        ('{"text": {"a": 1}}', "the column text holds dict instead of text"),
        ('{"input_ids": "a"}', "the column input_ids holds str instead of a list of integers"),
        ('{"input_ids": [1.7, 2, 3]}', "input_ids holds a list of float, int instead of a list of integers"),
        ('{"input_ids": [3.0]}', "the column input_ids holds a list of float"),
        ('{"input_ids": [true, false]}', "the column input_ids holds a list of bool"),
        ('{"input_ids": [1, null]}', "the column input_ids holds a list of int, null"),
        ('{"input_ids": [[1], [2]]}', "the column input_ids holds a list of list"),
        ('{"text": "a"', "the line that ends at byte 12: not JSON"),
        ("[" * 100_000, "nested too deep"),
        ('[{"text": "a"}\n', "not JSON"),
        ('{"text": "a"}\n{"test": "b"}', "the line that ends at byte 27: the row has no column text, which the first"),
        ('[{"text": "a"}, {"text": null}, {}]', "row 2: the row has no column text"),
        ('{"text": "a"}\n{"text": "b\\ud800"}', r"byte 33: the column text holds '\ud800', half of a surrogate"),
        ('{"input_ids": [%s]}' % ("9" * 400), "the column input_ids holds an id that takes more than 64 bits"),
        ("{}", "neither a column input_ids nor text, only "),
    ],
)
def test_json_of_another_shape_is_refused_by_place_and_what_was_found(tmp_path, content, found):
    assert found in refused(tmp_path / "a.json", content.encode())


@pytest.mark.parametrize("before", [b"", BOM, b"\n \r\n", BOM + b"\n\n"])
def test_marks_and_blank_lines_before_json_are_passed_over(tmp_path, before):
    file, rows = tmp_path / "a.json", (b'{"text": "a"}', b'{"text": "b"}')
    for content in (b"[%s, %s]" % rows, b"[\n%s,\n%s]\n" % rows, b"%s\n%s" % rows):
        assert read(file, before + content) == ["a", "b"]
        assert after_each(file) == [["b"], []]


def test_the_first_row_says_the_column_also_where_reading_goes_on(tmp_path):
    rows = [{"text": "a"}, {"text": "b", "input_ids": [1]}, {"text": "c", "input_ids": [2]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert after_each(tmp_path / "a.jsonl") == [["b", "c"], ["c"], []]


# --------------------------------------------------------------------------------------------- encodings and packing


def test_a_byte_order_mark_is_removed_once_at_the_start(tmp_path):
    content = BOM + b"a\n" + BOM + b"b"
    assert read(tmp_path / "a.txt", content) == [content.decode("utf-8-sig")] == ["a\n\ufeffb"]
    assert read(tmp_path / "a.txt.gz", gzip.compress(content)) == ["a\n\ufeffb"]
    assert read(tmp_path / "b.txt", BOM) == read(tmp_path / "c.txt", b"") == [""]
    for name in ("utf-16", "utf-32"):
        assert "is not UTF-8: byte 0 is 0xff, a mark of UTF-16" in refused(tmp_path / "a.txt", "text".encode(name))
        assert "a mark of UTF-16" in refused(tmp_path / "a.jsonl", '{"text": "a"}\n'.encode(name))


def test_an_empty_file_is_an_empty_document_and_read_once(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text("" if name == "b" else name)
    assert read(tmp_path) == ["a", "", "c"]
    assert after_each(tmp_path) == [["", "c"], ["c"], []]


def test_a_packed_file_that_is_cut_short_or_damaged_is_named(tmp_path):
    content = b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(5000))
    packed = {"gz": gzip.compress(content), "zst": pa.compress(content, "zstd", asbytes=True)}
    for kind, whole in packed.items():
        file = tmp_path / f"a.jsonl.{kind}"
        assert len(read(file, whole)) == 5000
        for cut in (5, len(whole) // 2, len(whole) - 1):
            assert "cannot be read, is cut short or damaged" in refused(file, whole[:cut])
        assert "is cut short or damaged" in refused(file, content)
    damaged = bytearray(packed["gz"])
    damaged[len(damaged) // 2] ^= 0xFF
    assert "a.jsonl.gz" in refused(tmp_path / "a.jsonl.gz", bytes(damaged))


def test_a_pointer_of_git_lfs_is_not_taken_for_text(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    assert "is a pointer of Git LFS" in refused(tmp_path / "a.txt", pointer)


# ------------------------------------------------------------------------------------------------------------ at random


def value(generator, depth=0):
    scalars = ["", "a", "naïve\n", "\u2028 x", 0, 5, -1, 70000, 2**70, 1.5, 3.0, True, None]
    if depth < 2 and generator.random() < 0.4:
        return [value(generator, depth + 1) for _ in range(generator.randint(0, 3))]
    return {"a": 1} if generator.random() < 0.05 else generator.choice(scalars)


def test_random_arrow_columns_are_what_pyarrow_reads_or_refused(tmp_path):
    generator, read_ones, file = random.Random(0), 0, tmp_path / "a.parquet"
    for _ in range(200):
        column, kind = generator.choice([("text", TEXT_TYPES), ("input_ids", ID_TYPES)])
        few = generator.choice([TEXTS, IDS, IDS, TEXTS, [value(generator) for _ in range(3)]])
        values = [generator.choice(few) for _ in range(generator.choice([1, 5, 300]))]
        try:
            array = pa.array(values)
            array = array.cast(generator.choice(kind)) if generator.random() < 0.5 else array
            pq.write_table(pa.table({column: array}), file, row_group_size=generator.choice([2, 1000]))
        except (pa.ArrowException, TypeError, OverflowError):
            continue
        try:
            found = read(file)
        except ValueError as error:
            assert re.search(rf"^{re.escape(str(file))}(, rows? [0-9to ]+)?: the column {column} holds ", str(error))
            good = [pa.types.is_null(array.type), array.type in kind and not any(None in x for x in values if x)]
            assert not any(good), (array.type, values, error)
            continue
        read_ones += 1
        missing = "" if pa.types.is_null(array.type) or column == "text" else []
        assert found == [missing if x is None else x for x in pq.read_table(file)[column].to_pylist()]
    assert read_ones > 30


def test_random_json_is_what_pyarrow_reads_or_refused(tmp_path):
    generator, read_ones = random.Random(1), 0
    for number in range(400):
        column = generator.choice(["text", "input_ids"])
        good = TEXTS if column == "text" else IDS
        rows = [{column: generator.choice(good)} for _ in range(generator.randint(1, 4))]
        if generator.random() < 0.5:
            rows[generator.randrange(len(rows))] = generator.choice([{column: value(generator)}, value(generator), {}])
        as_lines = generator.random() < 0.5
        content = "\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows, ensure_ascii=False, indent=1)
        content = generator.choice([b"", b"", BOM, b"\n", BOM + b"\r\n"]) + content.encode()
        packed = generator.random() < 0.3
        file = tmp_path / f"{number}.json{'.gz' if packed else ''}"
        whole = gzip.compress(content) if packed else content
        cut = generator.random() < 0.2
        whole = whole[: generator.randint(1, len(whole) - 1)] if cut else whole
        try:
            found = read(file, whole)
        except ValueError as error:
            assert str(file) in str(error) and type(error) is ValueError and "\n" not in str(error)
            fit = all(isinstance(row, dict) and column in row and row[column] in good for row in rows)
            assert cut or not fit, (rows, error)
            continue
        read_ones += 1
        assert len(found) == len(rows) or cut
        lines = b"\n".join(json.dumps(row).encode() for row in rows[: len(found)])
        expected = pa.json.read_json(pa.BufferReader(lines))[column].to_pylist() if lines else []
        assert found == ["" if x is None else x for x in expected]
    assert read_ones > 100


def test_json_and_parquet_files_give_what_datasets_gives(tmp_path):
    rows = datasets.Dataset.from_dict({"text": [text or "" for text in TEXTS]})
    rows.to_json(tmp_path / "a.json", lines=False)
    rows.to_json(tmp_path / "a.jsonl", lines=True)
    rows.to_parquet(tmp_path / "a.parquet")
    for file in tmp_path.glob("a.*"):
        kind = "parquet" if file.suffix == ".parquet" else "json"
        theirs = datasets.load_dataset(kind, data_files=str(file), split="train", cache_dir=str(tmp_path / "hf"))
        assert read(file) == theirs["text"][:] == rows["text"][:]
