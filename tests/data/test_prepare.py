"""Preparation: the same bytes however it runs, is stopped or is spread, and nothing half made under the final name."""

import errno
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest

from mamba2.data import Plan, load_tokens, load_validation, open_source, prepare, read_documents
from mamba2.tokenizer import get_tokenizer

ROOT = Path(__file__).parent.parent.parent
# `mamba2.data.prepare` as an attribute is the function
module = sys.modules["mamba2.data.prepare"]
BYTES = get_tokenizer("bytes")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MAMBA2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def texts_of(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    words = [
        "a",
        "the  ",
        "\n",
        "    return",
        "naïve",
        "e\u0301",
        "42",
        "中文",
        "<|padding|>",
        "...",
        "<|end of document|>",
    ]
    return [" ".join(generator.choices(words, k=generator.randint(0, 60))) for _ in range(count)]


def write_jsonl(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def command(*arguments, code=0) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, "-m", "mamba2.data", *map(str, arguments)]
    result = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert result.returncode == code, result.stdout + result.stderr
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def make(tmp_path, source, name="out", tokenizer=BYTES, workers=2, **choice) -> Path:
    prepare(tmp_path / name, Plan({"train": open_source(source, "train")}, tokenizer, **choice), workers)
    return tmp_path / name


def documents_in(tokens) -> list[list[int]]:
    return [part.tolist() for part in np.split(np.asarray(tokens.ids), tokens.starts[1:])]


@pytest.mark.parametrize("name", ["bytes", "gpt2", "gpt-neox-20b"])
def test_tokens_are_those_of_encode_with_every_document_ended(tmp_path, monkeypatch, name):
    monkeypatch.setattr(module, "BATCH", 500)
    tokenizer, texts = get_tokenizer(name), texts_of(200)
    folder = make(tmp_path, write_jsonl(tmp_path / "a.jsonl", texts), tokenizer=tokenizer)
    tokens = load_tokens(folder, "train", tokenizer)
    assert documents_in(tokens) == [[*tokenizer.encode(text), tokenizer.eot_id] for text in texts if text]
    assert tokens.largest == max(tokens.ids) and tokens.ids.dtype == np.uint16
    tokens.verify()


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json"])
def test_files_may_be_packed(tmp_path, kind, packed):
    content = {".txt": "some text", ".jsonl": '{"text": "some text"}\n', ".json": '[{"text": "some text"}]'}[
        kind
    ].encode()
    file = tmp_path / f"a{kind}{packed}"
    if packed == ".zst":
        with pyarrow.CompressedOutputStream(str(file), "zstd") as stream:
            stream.write(content)
    else:
        file.write_bytes(gzip.compress(content) if packed else content)
    assert list(read_documents(file, "train")) == ["some text"]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "json", "parquet", "saved", "stdlib", "hub", "txt"])
def test_every_source_goes_on_from_each_place_it_names(tmp_path, monkeypatch, kind):
    texts = [text for text in texts_of(20) if text]
    rows, file = datasets.Dataset.from_dict({"text": texts}), tmp_path / "source" / f"b.{kind}"
    file.parent.mkdir()
    source = file.parent
    lines = write_jsonl(tmp_path / "lines", texts).read_bytes()
    if kind == "jsonl":
        file.write_bytes(lines)
        write_jsonl(source / "a.jsonl", ["before"])
    elif kind == "jsonl.gz":
        file.write_bytes(gzip.compress(lines))
    elif kind == "jsonl.zst":
        with pyarrow.CompressedOutputStream(str(file), "zstd") as stream:
            stream.write(lines)
    elif kind == "json":
        file.write_text(json.dumps([{"text": text} for text in texts]))
    elif kind == "parquet":
        rows.to_parquet(file, batch_size=6)
    elif kind == "saved":
        rows.save_to_disk(source)
    elif kind == "txt":
        monkeypatch.setattr("mamba2.data.readers.TEXT_PIECE", 64)
        file.write_text("\n".join(texts), encoding="utf-8")
    elif kind == "hub":
        source = "some/name"
        hub(monkeypatch, {"train": rows})
    else:
        source = "stdlib"
        (tmp_path / "lib" / "site-packages").mkdir(parents=True)
        for i, text in enumerate(texts):
            (tmp_path / "lib" / f"{i:02}.py").write_text(text, encoding="utf-8")
        monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    opened = open_source(source, "train")
    items = list(opened.items((0, 0)))
    assert len(items) > 4
    for i, item in enumerate(items):
        rest, expected = list(opened.items(item.after)), items[i + 1 :]
        if kind == "txt":  # cut elsewhere, and the same text
            rest, expected = ["".join(x.document for x in some) for some in (rest, expected)]
        else:
            rest, expected = [[(x.document, x.after, x.ends) for x in some] for some in (rest, expected)]
        assert rest == expected
    if opened.total is not None and kind not in ("jsonl.gz", "jsonl.zst"):
        assert [item.read for item in items] == sorted(item.read for item in items)
        assert items[-1].read <= opened.total


def hub(monkeypatch, splits: dict):
    """A hub with one data set, at commit `c0ffee`."""

    def load_dataset_builder(name, config=None, revision=None):
        if name != "some/name":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist")
        streams = {split: rows.to_iterable_dataset() for split, rows in splits.items()}
        info = types.SimpleNamespace(splits=None)
        return types.SimpleNamespace(hash=revision or "c0ffee", info=info, as_streaming_dataset=lambda: streams)

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)


def test_a_hub_data_set_is_read_and_its_commit_recorded(tmp_path, monkeypatch):
    hub(monkeypatch, {"train": datasets.Dataset.from_dict({"text": ["one", None, "two"]})})
    folder = make(tmp_path, "some/name")
    assert json.loads((folder / "tokens.json").read_text())["plan"]["sources"]["train"]["revision"] == "c0ffee"
    assert [len(d) for d in documents_in(load_tokens(folder, "train", BYTES))] == [4, 4]
    assert open_source("some/name", "train", revision="1234").revision == "1234"
    assert load_validation("some/name", BYTES) is None
    with pytest.raises(ValueError, match="cannot load other/name"):
        open_source("other/name", "train")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="lies on this machine and has no revision 'main'"):
        open_source(tmp_path / "a.txt", "train", revision="main")


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox-20b"])
def test_a_text_file_in_pieces_has_the_ids_of_the_whole(tmp_path, monkeypatch, name):
    monkeypatch.setattr("mamba2.data.readers.TEXT_PIECE", 100)
    text = "\n".join(texts_of(60)) + "x\n\n  y  \n" + "z" * 500 + "\r\nend"
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_bytes(text.encode())
    (source / "b.txt").write_bytes(b"second")
    items = list(open_source(source, "train").items((0, 0)))
    assert len(items) > 10
    tokenizer = get_tokenizer(name)
    folder = make(tmp_path, source, tokenizer=tokenizer)
    whole = text.replace("\r\n", "\n")
    assert list(read_documents(source, "train")) == [whole, "second"]
    expected = [[*tokenizer.encode(document), tokenizer.eot_id] for document in (whole, "second")]
    assert documents_in(load_tokens(folder, "train", tokenizer)) == expected


@pytest.mark.parametrize("choice", [{}, {"validation_share": 0.3}, {"validation_documents": 7}])
def test_the_bytes_do_not_depend_on_workers_or_batches(tmp_path, monkeypatch, choice):
    file = write_jsonl(tmp_path / "a.jsonl", texts_of(300))
    made = []
    for i, (workers, batch) in enumerate([(1, 2**20), (1, 100), (4, 100), (3, 1000)]):
        monkeypatch.setattr(module, "BATCH", batch)
        made.append(contents(make(tmp_path, file, f"out{i}", get_tokenizer("gpt2"), workers, **choice)))
    assert all(other == made[0] for other in made[1:])
    assert ("val.bin" in made[0]) == bool(choice)


def test_held_out_documents_are_a_share_by_content_or_the_first(tmp_path):
    texts = [f"document {i % 500}" for i in range(1000)]  # every one twice
    file = write_jsonl(tmp_path / "a.jsonl", texts)

    def split(folder):
        train, val = load_tokens(folder, "train", BYTES), load_validation(folder, BYTES)
        return [[bytes(d[:-1]).decode() for d in documents_in(tokens)] for tokens in (train, val)]

    train, val = split(make(tmp_path, file, "share", validation_share=0.1))
    assert 60 < len(val) < 140 and not set(train) & set(val) and sorted(train + val) == sorted(texts)
    assert split(make(tmp_path, file, "first", validation_documents=3)) == [texts[3:], texts[:3]]


def test_ids_fit_their_type_and_the_vocabulary(tmp_path):
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6], None, [], [256], [70]]})
    rows.to_parquet(tmp_path / "a.parquet")
    tokens = load_tokens(make(tmp_path, tmp_path / "a.parquet"), "train", BYTES)
    assert documents_in(tokens) == [[5, 6, 256], [256], [70, 256]]
    (tmp_path / "b.jsonl").write_text('{"input_ids": [1, 257]}\n')
    with pytest.raises(ValueError, match="ids from 1 to 257, outside the 257 ids of bytes"):
        make(tmp_path, tmp_path / "b.jsonl", "bad")
    (tmp_path / "c.jsonl").write_text('{"input_ids": [1, 65536]}\n')
    wide = load_tokens(make(tmp_path, tmp_path / "c.jsonl", "wide", tokenizer=None), "train", None)
    assert wide.ids.dtype == np.uint32 and wide.ids.tolist() == [1, 65536, 0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, the line that ends at byte 24: not JSON"),
        ("a.jsonl", b'["a"]\n', "a.jsonl, row 0: a row is a JSON object with the column text or input_ids, not str"),
        ("a.jsonl", b'{"text": 5}\n', "byte 12: the column text holds int 5 instead of text"),
        ("a.jsonl", b'{"other": 5}\n', "neither a column input_ids nor text, only other"),
        ("a.jsonl", b'{"text": ""}\n', "is empty: not one document"),
        ("a.jsonl", b"", "is empty: not one document"),
        ("a.jsonl", b'{"input_ids": null, "text": "a"}\n', "of a table with both columns, .* only input_ids is read"),
        ("a.txt", b"ab\xff", "is not UTF-8: byte 2 is 0xff"),
        ("a.parquet", b"PAR1", "is not a parquet file, or cut short"),
    ],
)
def test_a_bad_file_is_one_sentence_and_leaves_nothing(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        make(tmp_path, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_table_of_other_columns_is_refused(tmp_path):
    datasets.Dataset.from_dict({"body": ["x"]}).save_to_disk(tmp_path / "saved")
    datasets.Dataset.from_dict({"body": ["x"]}).to_parquet(tmp_path / "a.parquet")
    for source in ("saved", "a.parquet"):
        with pytest.raises(ValueError, match="neither a column input_ids nor text, only body"):
            make(tmp_path, tmp_path / source)
    datasets.Dataset.from_dict({"input_ids": [[0.5]]}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(
        ValueError, match=r"b.parquet: the column input_ids holds list<element: double> instead of a list of int"
    ):
        make(tmp_path, tmp_path / "b.parquet")


def test_choices_that_hold_out_nothing_are_refused(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(ValueError, match="not one of its 2 documents falls to train"):
        make(tmp_path, file, validation_documents=2)
    with pytest.raises(ValueError, match="not one of its 2 documents falls to val"):
        make(tmp_path, file, validation_share=1e-9)
    for choice in ({"validation_share": 1.0}, {"validation_share": -0.1}, {"validation_documents": -1}):
        with pytest.raises(ValueError, match="held out"):
            make(tmp_path, file, **choice)
    source = open_source(file, "train")
    with pytest.raises(ValueError, match="not both"):
        Plan({"train": source, "val": source}, BYTES, validation_share=0.5)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_two_do_not_make_the_same(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ["one"])
    make(tmp_path, file)
    with pytest.raises(FileExistsError, match="is not overwritten"):
        make(tmp_path, file)
    with (
        module.working_folder(tmp_path / "busy", wait=False),
        pytest.raises(BlockingIOError, match="another process is preparing"),
    ):
        make(tmp_path, file, "busy")


def test_processes_that_load_the_same_source_at_once_share_the_work(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts_of(2000))
    code = f"""
import sys; from mamba2.data import load_tokens; from mamba2.tokenizer import get_tokenizer
print(load_tokens({str(tmp_path / "a.jsonl")!r}, "train", get_tokenizer("gpt2")).sha256)"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    several = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    printed = {process.communicate()[0] for process in several}
    assert [process.returncode for process in several] == [0, 0, 0] and len(printed) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


# ------------------------------------------------------------------------------------------------------- interruptions


class Stop(BaseException):
    pass


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
@pytest.mark.parametrize("choice", [{}, {"validation_share": 0.3}, {"validation_documents": 40}])
def test_stopped_at_any_write_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch, kind, choice):
    """Every write in turn is the last one, and reaches the disk in part."""
    if kind == "jsonl":
        source = write_jsonl(tmp_path / "a.jsonl", texts_of(120))
    else:
        source = tmp_path / "texts"
        source.mkdir()
        for i in range(60):
            (source / f"{i}.txt").write_text("\n".join(texts_of(1 + i % 5, seed=i)) + "x", encoding="utf-8")
    monkeypatch.setattr("mamba2.data.readers.TEXT_PIECE", 300)
    monkeypatch.setattr(module, "BATCH", 600)
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0.0)
    expected = contents(make(tmp_path, source, "expected", get_tokenizer("gpt2"), **choice))
    written, write, stops = 0, module._write, 0

    def write_some(file, data, work):
        nonlocal written
        written += 1
        if written > 7:
            file.write(data[: len(data) // 2])
            raise Stop
        write(file, data, work)

    monkeypatch.setattr(module, "_write", write_some)
    while not (tmp_path / "out").exists():
        written = 0
        try:
            make(tmp_path, source, "out", get_tokenizer("gpt2"), **choice)
        except Stop:
            stops += 1
    assert stops > 5
    assert contents(tmp_path / "out") == expected


def killed_at_random(tmp_path, kills: int) -> None:
    generator = random.Random(0)
    file = write_jsonl(tmp_path / "a.jsonl", texts_of(4000))
    expected = contents(make(tmp_path, file, "expected", get_tokenizer("gpt2"), validation_share=0.1))
    code = f"""
import sys, time, importlib
prepare = importlib.import_module("mamba2.data.prepare")
from mamba2.data import Plan, open_source
from mamba2.tokenizer import get_tokenizer
from pathlib import Path
prepare.COMMIT_SECONDS, prepare.BATCH = 0.0, 2000
encode = prepare._encode
prepare._encode = lambda *arguments: (time.sleep(0.004), encode(*arguments))[1]
plan = Plan({{"train": open_source({str(file)!r}, "train")}}, get_tokenizer("gpt2"), validation_share=0.1)
print("go", flush=True)
prepare.prepare(Path({str(tmp_path / "out")!r}), plan, 2)"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    journals = []
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(generator.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if (tmp_path / "out").exists():
            break
        journal = tmp_path / ".out.preparing" / "journal.json"
        journals.append(json.loads(journal.read_text())["seen"] if journal.exists() else 0)
    assert journals == sorted(journals) and journals[-1] > 0  # work is kept
    if not (tmp_path / "out").exists():
        make(tmp_path, file, "out", get_tokenizer("gpt2"), validation_share=0.1)
    assert contents(tmp_path / "out") == expected
    assert not (tmp_path / ".out.preparing").exists()


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(tmp_path):
    killed_at_random(tmp_path, 3)


@pytest.mark.slow
def test_killed_at_many_random_moments_it_goes_on_to_the_same_bytes(tmp_path):
    killed_at_random(tmp_path, 12)


def test_stopped_between_the_sidecar_and_the_last_rename_it_only_renames(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", texts_of(20))
    expected = contents(make(tmp_path, file, "expected"))
    publish = module.publish

    def stop(*_):
        raise Stop

    monkeypatch.setattr(module, "publish", stop)
    with pytest.raises(Stop):
        make(tmp_path, file)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(module, "publish", publish)
    other = write_jsonl(tmp_path / "b.jsonl", ["other"])
    with pytest.raises(ValueError, match="unfinished preparation of another source"):
        make(tmp_path, other)
    monkeypatch.setattr(module, "_make", stop)
    assert contents(make(tmp_path, file)) == expected


def test_a_full_disk_keeps_what_is_done_and_a_later_call_goes_on(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", texts_of(200))
    expected = contents(make(tmp_path, file, "expected"))
    monkeypatch.setattr(module, "BATCH", 1000)
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0.0)
    real, budget = os.write, 20_000

    class Full:
        """A file on a disk that takes `budget` bytes, and then a part of a write and no more."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            nonlocal budget
            if budget == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            taken = real(self.file.fileno(), bytes(data[:budget]))
            budget -= taken
            return taken

    write = module._write
    monkeypatch.setattr(module, "_write", lambda file, data, work: write(Full(file), data, work))
    with pytest.raises(OSError, match=r"cannot write in .*No space left on device; what is done is kept"):
        make(tmp_path, file)
    assert not (tmp_path / "out").exists()
    assert json.loads((tmp_path / ".out.preparing" / "journal.json").read_text())["seen"] > 10
    monkeypatch.setattr(module, "_write", write)
    assert contents(make(tmp_path, file)) == expected


def test_the_work_of_another_source_or_tokenizer_is_not_touched(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", texts_of(200))
    monkeypatch.setattr(module, "BATCH", 1000)
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0.0)
    encode, calls = module._encode, iter(range(1000))

    def stop_later(*arguments):
        if next(calls) > 10:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(module, "_encode", stop_later)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, file)
    monkeypatch.setattr(module, "_encode", encode)
    before = contents(tmp_path / ".out.preparing")
    other = write_jsonl(tmp_path / "b.jsonl", ["other"])
    for source, arguments in (
        (other, {}),
        (file, {"tokenizer": get_tokenizer("gpt2")}),
        (file, {"validation_share": 0.5}),
    ):
        with pytest.raises(ValueError, match=r"\.out\.preparing holds the unfinished preparation of another"):
            make(tmp_path, source, **arguments)
    assert contents(tmp_path / ".out.preparing") == before
    assert "train.bin" in contents(make(tmp_path, file))


@pytest.mark.parametrize(("kind", "place"), [("jsonl", "what ends at byte"), ("txt", r"150\.txt, what ends at byte")])
def test_a_document_that_cannot_be_encoded_is_named_and_the_work_is_kept(tmp_path, monkeypatch, kind, place):
    texts = [*(text + "." for text in texts_of(150)), "unlucky", *texts_of(50)]
    file = tmp_path / "source.jsonl"
    if kind == "jsonl":
        write_jsonl(file, texts)
    else:
        file = tmp_path / "source"
        file.mkdir()
        for number, text in enumerate(texts):
            (file / f"{number:03}.txt").write_text(text, encoding="utf-8")
    expected = contents(make(tmp_path, file, "expected"))
    monkeypatch.setattr(module, "BATCH", 1000)
    encode = type(BYTES).encode_documents

    def fail(self, documents):
        if "unlucky" in documents:
            raise ValueError("stack is full")
        return encode(self, documents)

    monkeypatch.setattr(type(BYTES), "encode_documents", fail)
    message = rf"cannot encode a document of .*source.*{place} \d+\): stack is full; what is done is kept"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            make(tmp_path, file)
        journal = json.loads((tmp_path / ".out.preparing" / "journal.json").read_text())
        assert 100 < journal["seen"] <= 150 and journal["files"]["train"]["documents"] > 100
    encoded = []
    monkeypatch.setattr(type(BYTES), "encode_documents", lambda self, some: encoded.extend(some) or encode(self, some))
    assert contents(make(tmp_path, file)) == expected
    assert len(encoded) < 110  # what was done was not done again


def test_documents_that_encode_only_one_by_one_have_the_same_bytes(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", texts_of(100))
    expected = contents(make(tmp_path, file, "expected"))
    encode = type(BYTES).encode_documents

    def fail(self, documents):
        if len(documents) > 1:
            raise ValueError("too much at once")
        return encode(self, documents)

    monkeypatch.setattr(type(BYTES), "encode_documents", fail)
    assert contents(make(tmp_path, file)) == expected


def test_files_of_text_and_of_ids_may_lie_in_one_folder(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    (source / "b.jsonl").write_text('{"input_ids": [5, 6]}\n{"input_ids": []}\n{"input_ids": [7, 256]}\n')
    (source / "c.txt").write_text("b")
    tokens = load_tokens(make(tmp_path, source), "train", BYTES)
    assert documents_in(tokens) == [[97, 256], [5, 6, 256], [7, 256], [98, 256]]
    assert tokens.empty == 2


def test_progress_counts_the_bytes_of_files(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", texts_of(50))
    bars = []

    class Bar:
        def __init__(self, total, initial, **_):
            self.total, self.n = total, initial
            bars.append(self)

        def update(self, n):
            self.n += n

        def close(self):
            pass

    monkeypatch.setattr(module, "tqdm", Bar)
    make(tmp_path, file)
    assert bars[0].total == bars[0].n == file.stat().st_size


def test_what_was_left_without_a_journal_is_not_taken_over(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ["one"])
    work = tmp_path / ".out.preparing"
    work.mkdir()
    for name in ("train.bin", "val.bin", "other"):
        (work / name).write_bytes(b"left over")
    assert contents(make(tmp_path, file)) == contents(make(tmp_path, file, "expected"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(OSError, match="/proc/"):
        prepare(Path("/proc/mamba2-test/out"), Plan({"train": open_source(file, "train")}, BYTES))


def test_memory_does_not_grow_with_the_source(tmp_path):
    """The largest resident size of two processes, on 8 and on 64 MB of generated text that is nowhere held."""
    peaks = []
    for count in (2_000, 16_000):
        code = f"""
import resource, importlib
prepare = importlib.import_module("mamba2.data.prepare")
from mamba2.data.sources import Item, Source
from mamba2.tokenizer import get_tokenizer
from pathlib import Path
def items(place):
    for i in range(place[1], {count}):
        yield Item("0123456789abcde " * 256 + str(i), (0, i + 1), i)
plan = prepare.Plan({{"train": Source("made", "train", "1", None, "", items)}}, get_tokenizer("bytes"))
prepare.prepare(Path({str(tmp_path / str(count))!r}), plan, 2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        peaks.append(int(result.stdout) / 1024)
    assert (tmp_path / "16000" / "train.bin").stat().st_size > 130e6
    assert peaks[1] < peaks[0] + 30, peaks


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_with_its_options(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    write_jsonl(source / "train.jsonl", texts_of(40))
    write_jsonl(source / "test.jsonl", ["held out"])
    base = [source, "--tokenizer", "bytes", "--output"]

    def splits(folder) -> dict:
        content = json.loads((tmp_path / folder / "tokens.json").read_text())
        return {name: entry["documents"] for name, entry in content["splits"].items()}

    monkeypatch.setattr(sys, "argv", [])
    from mamba2.data.__main__ import main

    def called(folder, *arguments):
        monkeypatch.setattr(sys, "argv", ["mamba2.data", *map(str, [*base, tmp_path / folder, *arguments])])
        main()
        return splits(folder)

    texts = sum(bool(text) for text in texts_of(40))
    assert called("a") == {"train": texts, "val": 1}
    assert called("b", "--no-validation", "--workers", 1) == {"train": texts}
    assert called("c", "--validation-documents", 5)["val"] == sum(bool(text) for text in texts_of(40)[:5])
    share = called("d", "--validation-share", 0.5)
    assert share["train"] + share["val"] == texts
    assert called("e", "--split", "test", "--validation-split", "train") == {"train": 1, "val": texts}
    with pytest.raises(ValueError, match=r"train and val would both be the split train of .*source"):
        called("g", "--validation-split", "train")
    hub(monkeypatch, {"train": datasets.Dataset.from_dict({"text": ["one"]})})
    base[0] = "some/name"
    assert called("f", "--config", "small", "--revision", "v1") == {"train": 1}
    recorded = json.loads((tmp_path / "f" / "tokens.json").read_text())["plan"]["sources"]["train"]
    assert recorded == {"name": "some/name:small", "split": "train", "revision": "v1"}


def test_the_command_prints_counts_and_hashes_and_fails_in_one_sentence(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ["one", "three"])
    printed = command(file, "--tokenizer", "bytes", "--output", tmp_path / "out").stdout
    digest = load_tokens(tmp_path / "out", "train", BYTES).sha256
    assert f"train.bin: 10 tokens, 2 documents, sha256 {digest}" in printed
    result = command(file, "--tokenizer", "bytes", "--output", tmp_path / "out", code=1)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    result = command(tmp_path, "--tokenizer", "bytes", "--output", tmp_path / "in", code=1)
    assert "lies inside the source" in result.stderr
    result = command(file, "--output", tmp_path / "out2", code=1)
    assert "is text" in result.stderr and "--tokenizer" in result.stderr
    assert "--workers must be at least 1" in command(file, "--output", "x", "--workers", 0, code=2).stderr
