"""Preparation gives the same bytes with any number of threads and after any interruption, in a folder that is complete
once it has its final name."""

import errno
import gzip
import json
import multiprocessing
import os
import random
import runpy
import sys
import threading
import time
import tracemalloc
import types
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest

from mamba2.data import Plan, load_tokens, load_validation, open_source, prepare, read_documents
from mamba2.data.sources import Item, Source
from mamba2.tokenizer import get_tokenizer

# `mamba2.data.prepare` as an attribute is the function
module = sys.modules["mamba2.data.prepare"]
BYTES, GPT2 = get_tokenizer("bytes"), get_tokenizer("gpt2")
WORDS = [
    "a",
    "the  ",
    "\n",
    "    return",
    "naïve",
    "e\u0301",
    "42",
    "中文",
    "...",
    "<|padding|>",
    "<|end of document|>",
]
FORK = multiprocessing.get_context("fork")


def texts_of(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(0, 60))) for _ in range(count)]


def write_jsonl(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def write_files(folder: Path, texts: list[str], ending: str = ".txt") -> Path:
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03}{ending}").write_text(text, encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def described(folder: Path, file: str = "tokens.json") -> dict:
    return json.loads((folder / file).read_text())


def make(tmp_path, source, name="out", tokenizer=BYTES, workers=2, **choice) -> Path:
    prepare(tmp_path / name, Plan({"train": open_source(source, "train")}, tokenizer, **choice), workers)
    return tmp_path / name


def documents_in(tokens) -> list[list[int]]:
    return [part.tolist() for part in np.split(np.asarray(tokens.ids), tokens.starts[1:])]


def commit_often(monkeypatch, batch: int = 1000) -> None:
    monkeypatch.setattr(module, "BATCH", batch)
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0.0)


@pytest.mark.parametrize("name", ["bytes", "gpt2", "gpt-neox-20b"])
def test_tokens_are_those_of_encode_with_every_document_ended(tmp_path, monkeypatch, name):
    monkeypatch.setattr(module, "BATCH", 500)
    tokenizer, texts = get_tokenizer(name), texts_of(200)
    folder = make(tmp_path, write_jsonl(tmp_path / "a.jsonl", texts), tokenizer=tokenizer)
    tokens = load_tokens(folder, "train", tokenizer)
    assert documents_in(tokens) == [[*tokenizer.encode(text), tokenizer.eot_id] for text in texts if text]
    assert tokens.largest == max(tokens.ids) and tokens.ids.dtype == np.uint16
    tokens.verify()


PACK = {"": bytes, ".gz": gzip.compress, ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True)}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize(
    ("kind", "content"),
    [(".txt", "some text"), (".jsonl", '{"text": "some text"}\n'), (".json", '[{"text": "some text"}]')],
)
def test_files_may_be_packed(tmp_path, kind, content, packed):
    file = tmp_path / f"a{kind}{packed}"
    file.write_bytes(PACK[packed](content.encode()))
    assert list(read_documents(file, "train")) == ["some text"]


def library(monkeypatch, folder: Path, texts: list[str]) -> None:
    """A standard library of files with these texts."""
    write_files(folder, texts, ".py")
    write_files(folder / "site-packages", ["installed"], ".py")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(folder)})


def hub(monkeypatch, splits: dict) -> None:
    """A hub with one data set, at commit `c0ffee`."""

    def load_dataset_builder(name, config=None, revision=None):
        if name != "some/name":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist")
        streams = {split: rows.to_iterable_dataset() for split, rows in splits.items()}
        info = types.SimpleNamespace(splits=None)
        return types.SimpleNamespace(hash=revision or "c0ffee", info=info, as_streaming_dataset=lambda: streams)

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)


KINDS = ["folder", "jsonl", "jsonl.gz", "jsonl.zst", "json", "parquet", "saved", "stdlib", "hub", "txt"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_documents_and_goes_on_from_each_place_it_names(tmp_path, monkeypatch, kind):
    texts = [text for text in texts_of(20) if text]
    rows, source = datasets.Dataset.from_dict({"text": texts}), tmp_path / "source"
    file = source / "default" / f"train-00000-of-00001.{kind}"
    file.parent.mkdir(parents=True)
    if kind in ("folder", "stdlib"):
        write_files(source / "train", texts)
        library(monkeypatch, tmp_path / "library", texts)
        source = "stdlib" if kind == "stdlib" else source
    elif kind in ("saved", "hub"):
        datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(source)
        hub(monkeypatch, {"train": rows})
        source = "some/name" if kind == "hub" else source
    elif kind.startswith("jsonl"):
        lines = write_jsonl(tmp_path / "lines", texts).read_bytes()
        file.write_bytes(PACK[kind.removeprefix("jsonl")](lines))
        texts = [*texts, "in another file"]
        write_jsonl(source / "default" / "train-00001.jsonl", texts[-1:])
    elif kind == "json":
        file.write_text(json.dumps([{"text": text} for text in texts]))
    elif kind == "parquet":
        rows.to_parquet(file, batch_size=6)
    else:
        monkeypatch.setattr("mamba2.data.readers.TEXT_PIECE", 64)
        texts = ["\n".join(texts)]
        file.write_text(texts[0], encoding="utf-8")
    opened = open_source(source, "train")
    items, documents = list(opened.items((0, 0))), list(opened.documents())
    assert len(items) > 4
    assert documents == (texts if kind != "stdlib" else [text for text in texts if text in documents])
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


def test_a_hub_data_set_is_read_and_its_commit_recorded(tmp_path, monkeypatch):
    hub(monkeypatch, {"train": datasets.Dataset.from_dict({"text": ["one", None, "two"]})})
    folder = make(tmp_path, "some/name")
    assert described(folder)["plan"]["sources"]["train"]["revision"] == "c0ffee"
    assert [len(d) for d in documents_in(load_tokens(folder, "train", BYTES))] == [4, 4]
    assert open_source("some/name", "train", revision="1234").revision == "1234"
    assert load_validation("some/name", BYTES) is None
    with pytest.raises(ValueError, match="cannot load other/name"):
        open_source("other/name", "train")
    with pytest.raises(ValueError, match="lies on this machine and has no revision 'main'"):
        open_source(tmp_path, "train", revision="main")


def test_the_standard_library_is_split_by_file(tmp_path, monkeypatch):
    texts = [f"file {i % 300}" for i in range(400)]
    library(monkeypatch, tmp_path / "library", texts)
    train, held_out = (list(read_documents("stdlib", split)) for split in ("train", "validation"))
    assert len(train) > 10 * len(held_out) > 0 and sorted(train + held_out) == sorted(texts)
    assert not set(train) & set(held_out)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox-20b"])
def test_a_text_file_in_pieces_has_the_ids_of_the_whole(tmp_path, monkeypatch, name):
    monkeypatch.setattr("mamba2.data.readers.TEXT_PIECE", 100)
    text = "\n".join(texts_of(60)) + "x\n\n  y  \n" + "z" * 500
    source = write_files(tmp_path / "source", [text, "second"])
    with open(source / "000.txt", "ab") as file:
        file.write(b"\r\nend")
    documents = [text + "\nend", "second"]
    assert len(list(open_source(source, "train").items((0, 0)))) > 10
    assert list(read_documents(source, "train")) == documents
    tokenizer = get_tokenizer(name)
    tokens = load_tokens(make(tmp_path, source, tokenizer=tokenizer), "train", tokenizer)
    assert documents_in(tokens) == [[*tokenizer.encode(document), tokenizer.eot_id] for document in documents]


@pytest.mark.parametrize("choice", [{}, {"validation_share": 0.3}, {"validation_documents": 7}])
def test_the_bytes_do_not_depend_on_workers_or_batches(tmp_path, monkeypatch, choice):
    file = write_jsonl(tmp_path / "a.jsonl", texts_of(300))
    made = []
    for i, (workers, batch) in enumerate([(1, 2**20), (1, 100), (4, 100), (3, 1000)]):
        monkeypatch.setattr(module, "BATCH", batch)
        made.append(contents(make(tmp_path, file, f"out{i}", GPT2, workers, **choice)))
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
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 0], [70000]]})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "wide")
    wide = load_tokens(tmp_path / "wide", "train", None)
    assert wide.ids.dtype == np.uint32 and wide.ids.tolist() == [5, 6, 7, 0, 8, 0, 70000, 0]
    wide.check_vocabulary(70001)
    with pytest.raises(ValueError, match="the id 70000, outside the model's vocabulary of 70000"):
        wide.check_vocabulary(70000)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, the line that ends at byte 24: not JSON"),
        ("a.jsonl", b'{"text": ""}\n', "is empty: not one document"),
        ("a.jsonl", b"", "is empty: not one document"),
        ("a.jsonl", b'{"input_ids": null, "text": "a"}\n', "of a table with both columns, .* only input_ids is read"),
        ("a.jsonl", b'{"input_ids": [-1, 5]}\n', "ids from -1 to 5, outside the 257 ids of bytes"),
        ("a.jsonl", b'{"input_ids": [1, 257]}\n', "ids from 1 to 257, outside the 257 ids of bytes .*ends at byte 24"),
        ("a.txt", b"ab\xff", "is not UTF-8: byte 2 is 0xff"),
        ("a.parquet", b"PAR1", "is not a parquet file, or cut short"),
        ("a.csv", b"x", "is none of .txt, .jsonl"),
        ("absent/../.", b"", "has no split 'train'; it has no .txt"),
    ],
)
def test_a_bad_file_is_one_sentence_and_leaves_nothing(tmp_path, name, content, message):
    source = tmp_path / "source" / name
    source.parent.mkdir(parents=True)
    if source.suffix:
        source.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokens(source, "train", BYTES)
    assert {file.suffix for file in (tmp_path / "cache").rglob("*")} <= {".lock"}
    with pytest.raises(FileNotFoundError, match="no data at"):
        load_tokens(tmp_path / "absent", "train", BYTES)


def test_a_changed_source_is_encoded_again(tmp_path):
    for text in ("one", "three"):
        (tmp_path / "a.txt").write_text(text)
        assert len(load_tokens(tmp_path / "a.txt", "train", BYTES).ids) == len(text) + 1


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
    busy = module.working_folder(tmp_path / "busy", wait=False)
    with busy, pytest.raises(BlockingIOError, match="another process is preparing"):
        make(tmp_path, file, "busy")


def load_hash(file: Path) -> str:
    return load_tokens(file, "train", GPT2).sha256


def test_processes_that_load_the_same_source_at_once_share_the_work(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", texts_of(2000))
    with FORK.Pool(3) as pool:
        assert len(set(pool.map(load_hash, [file] * 3, chunksize=1))) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


# ------------------------------------------------------------------------------------------------------- interruptions


class Stop(BaseException):
    pass


def stop(*_):
    raise Stop


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
@pytest.mark.parametrize("choice", [{}, {"validation_share": 0.3}, {"validation_documents": 20}])
def test_stopped_at_any_write_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch, kind, choice):
    """Each call stops in the middle of its eighth write."""
    if kind == "jsonl":
        source = write_jsonl(tmp_path / "a.jsonl", texts_of(60))
    else:
        source = write_files(tmp_path / "texts", ["\n".join(texts_of(1 + i % 5, seed=i)) + "x" for i in range(30)])
    monkeypatch.setattr("mamba2.data.readers.TEXT_PIECE", 300)
    commit_often(monkeypatch, 600)
    expected = contents(make(tmp_path, source, "expected", GPT2, **choice))
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
            make(tmp_path, source, "out", GPT2, **choice)
        except Stop:
            stops += 1
    assert stops > 5
    assert contents(tmp_path / "out") == expected


def prepare_slowly(output: Path, plan: Plan) -> None:
    encode = module._encode
    module._encode = lambda *arguments: (time.sleep(0.004), encode(*arguments))[1]
    module.COMMIT_SECONDS, module.BATCH = 0.0, 2000
    module.tqdm.set_lock(threading.RLock())  # the default lock is shared with the parent process
    prepare(output, plan, 2)


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(tmp_path):
    generator = random.Random(0)
    file = write_jsonl(tmp_path / "a.jsonl", texts_of(4000))
    plan = Plan({"train": open_source(file, "train")}, GPT2, validation_share=0.1)
    prepare(tmp_path / "expected", plan)
    journals = []
    for _ in range(8):
        process = FORK.Process(target=prepare_slowly, args=(tmp_path / "out", plan))
        process.start()
        time.sleep(generator.uniform(0, 0.2))
        process.kill()
        process.join()
        if (tmp_path / "out").exists():
            break
        journal = tmp_path / ".out.preparing" / "journal.json"
        journals.append(described(journal.parent, journal.name)["seen"] if journal.exists() else 0)
    assert journals == sorted(journals) and journals[-1] > 0  # work is kept
    prepare(tmp_path / "out", plan, wait=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert not (tmp_path / ".out.preparing").exists()


def test_stopped_between_the_sidecar_and_the_last_rename_it_only_renames(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", texts_of(20))
    expected = contents(make(tmp_path, file, "expected"))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(module, "publish", stop)
        make(tmp_path, file)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="unfinished preparation of another source"):
        make(tmp_path, write_jsonl(tmp_path / "b.jsonl", ["other"]))
    monkeypatch.setattr(module, "_make", stop)
    assert contents(make(tmp_path, file)) == expected


def test_a_full_disk_keeps_what_is_done_and_a_later_call_goes_on(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", texts_of(200))
    expected = contents(make(tmp_path, file, "expected"))
    commit_often(monkeypatch)
    real, budget, write = os.write, 20_000, module._write

    class Full:
        """A file on a disk that is full after `budget` bytes, in the middle of a write."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            nonlocal budget
            if budget == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            taken = real(self.file.fileno(), bytes(data[:budget]))
            budget -= taken
            return taken

    with monkeypatch.context() as patch, pytest.raises(OSError) as error:
        patch.setattr(module, "_write", lambda file, data, work: write(Full(file), data, work))
        make(tmp_path, file)
    assert error.match(r"cannot write in .*No space left on device; what is done is kept")
    assert not (tmp_path / "out").exists()
    assert described(tmp_path / ".out.preparing", "journal.json")["seen"] > 10
    assert contents(make(tmp_path, file)) == expected


def test_the_work_of_another_source_or_tokenizer_is_not_touched(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", texts_of(200))
    commit_often(monkeypatch)
    encode, calls = module._encode, iter(range(1000))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(module, "_encode", lambda *some: stop() if next(calls) > 10 else encode(*some))
        make(tmp_path, file)
    before = contents(tmp_path / ".out.preparing")
    other = write_jsonl(tmp_path / "b.jsonl", ["other"])
    for source, arguments in ((other, {}), (file, {"tokenizer": GPT2}), (file, {"validation_share": 0.5})):
        with pytest.raises(ValueError, match=r"\.out\.preparing holds the unfinished preparation of another"):
            make(tmp_path, source, **arguments)
    assert contents(tmp_path / ".out.preparing") == before
    assert "train.bin" in contents(make(tmp_path, file))


@pytest.mark.parametrize(("kind", "place"), [("jsonl", "what ends at byte"), ("txt", r"150\.txt, what ends at byte")])
def test_a_document_that_cannot_be_encoded_is_named_and_the_work_is_kept(tmp_path, monkeypatch, kind, place):
    """The others are encoded one by one, as here several at once always fail, and have the same bytes."""
    texts = [*(text + "." for text in texts_of(150)), "unlucky", *texts_of(50)]
    write = write_jsonl if kind == "jsonl" else write_files
    source = write(tmp_path / f"source.{kind}", texts)
    expected = contents(make(tmp_path, source, "expected"))
    monkeypatch.setattr(module, "BATCH", 1000)
    encode, encoded, unlucky = type(BYTES).encode_documents, [], ["unlucky"]

    def fail(self, documents):
        if len(documents) > 1 or documents == unlucky:
            raise ValueError("stack is full")
        encoded.extend(documents)
        return encode(self, documents)

    monkeypatch.setattr(type(BYTES), "encode_documents", fail)
    message = rf"cannot encode a document of .*source.*{place} \d+\): stack is full; what is done is kept"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            make(tmp_path, source)
        journal = described(tmp_path / ".out.preparing", "journal.json")
        assert 100 < journal["seen"] <= 150 and journal["files"]["train"]["documents"] > 100
    unlucky.clear()
    encoded.clear()
    assert contents(make(tmp_path, source)) == expected
    assert len(encoded) < 110  # what was done was not done again


def test_files_of_text_and_of_ids_may_lie_in_one_folder(tmp_path):
    source = write_files(tmp_path / "source", ["b"])
    (source / "0.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    (source / "00.jsonl").write_text('{"input_ids": [5, 6]}\n{"input_ids": []}\n{"input_ids": [7, 256]}\n')
    tokens = load_tokens(make(tmp_path, source), "train", BYTES)
    assert documents_in(tokens) == [[97, 256], [5, 6, 256], [7, 256], [98, 256]]
    assert tokens.empty == 2


def test_progress_counts_the_bytes_of_files(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", texts_of(50))
    bars = []

    class Bar(types.SimpleNamespace):
        def update(self, n):
            self.n += n

        def close(self):
            bars.append(self)

    monkeypatch.setattr(module, "tqdm", lambda initial, **options: Bar(n=initial, **options))
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
        make(Path("/proc/mamba2-test"), file)


def test_memory_does_not_grow_with_the_source(tmp_path, monkeypatch):
    """The most memory in use, with 2 and with 8 MB of text that is generated piece by piece."""
    monkeypatch.setattr(module, "BATCH", 2**15)
    peaks = []
    for count in (500, 2000):

        def items(place, count=count):
            for i in range(place[1], count):
                yield Item("0123456789abcde " * 256 + str(i), (0, i + 1), i)

        tracemalloc.start()
        prepare(tmp_path / str(count), Plan({"train": Source("made", "train", "1", None, "", items)}, BYTES), 2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (tmp_path / "2000" / "train.bin").stat().st_size > 16e6
    assert peaks[1] < peaks[0] + 1e6, peaks


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`python -m mamba2.data SOURCE --output tmp_path/FOLDER ...`; what its tokens.json says."""
    limit = sys.get_int_max_str_digits()

    def run(source, folder, *options) -> dict:
        arguments = [source, "--output", tmp_path / folder, *options]
        monkeypatch.setattr(sys, "argv", ["mamba2.data", *map(str, arguments)])
        monkeypatch.delitem(sys.modules, "mamba2.data.__main__", raising=False)  # another test imports it
        runpy.run_module("mamba2.data", run_name="__main__")
        return described(tmp_path / folder)

    yield run
    sys.set_int_max_str_digits(limit)


def test_the_command_with_its_options(tmp_path, monkeypatch, command):
    texts = texts_of(40)
    source = write_files(tmp_path / "source", ["held out"], "test.txt")
    write_jsonl(source / "train.jsonl", texts)
    full = sum(map(bool, texts))

    def documents(folder, *options) -> dict:
        splits = command(source, folder, "--tokenizer", "bytes", *options)["splits"]
        return {name: entry["documents"] for name, entry in splits.items()}

    assert documents("a") == {"train": full, "val": 1}
    assert documents("b", "--no-validation", "--workers", 1) == {"train": full}
    assert documents("c", "--validation-documents", 5)["val"] == sum(map(bool, texts[:5]))
    share = documents("d", "--validation-share", 0.5)
    assert share["train"] + share["val"] == full
    assert documents("e", "--split", "test", "--validation-split", "train") == {"train": 1, "val": full}
    hub(monkeypatch, {"train": datasets.Dataset.from_dict({"text": ["one"]})})
    made = command("some/name", "f", "--tokenizer", "bytes", "--config", "small", "--revision", "v1")
    assert made["splits"]["train"]["documents"] == 1 and "val" not in made["splits"]
    assert made["plan"]["sources"]["train"] == {"name": "some/name:small", "split": "train", "revision": "v1"}


def test_the_command_prints_counts_and_hashes_and_fails_in_one_sentence(tmp_path, command, capsys):
    source = write_files(tmp_path / "source", ["one", "three"])
    command(source, "out", "--tokenizer", "bytes")
    digest = load_tokens(tmp_path / "out", "train", BYTES).sha256
    assert f"train.bin: 10 tokens, 2 documents, sha256 {digest}" in capsys.readouterr().out
    for folder, options, code, message in (
        ("out", ["--tokenizer", "bytes"], 1, "is not overwritten"),
        ("source/in", ["--tokenizer", "bytes"], 1, "lies inside the source"),
        (
            "other",
            [],
            1,
            "is text, and the model carries no tokenizer to encode it with (`python -m mamba2.data` takes --",
        ),
        (
            "other",
            ["--validation-split", "train", "--tokenizer", "bytes"],
            1,
            "train and val would both be the split train of",
        ),
        ("other", ["--workers", 0], 2, "--workers must be at least 1"),
    ):
        with pytest.raises(SystemExit) as error:
            command(source, folder, *options)
        printed = capsys.readouterr().err
        assert error.value.code == code and message in printed
        assert code == 2 or (printed.startswith("error: ") and printed.count("\n") == 1)
