"""From every kind of source to tokens, and from tokens to batches that depend on (seed, step) alone."""

import json

import datasets
import numpy as np
import pytest
import torch

from mamba2.data import Tokens, Windows, load_tokens, load_validation, read_documents, wikitext_articles
from mamba2.tokenizer import get_tokenizer

TEXTS = ["first document", "second", "", "the third, which is longer than the others"]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MAMBA2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def write(tmp_path, kind):
    folder = tmp_path / "source"
    folder.mkdir()
    if kind == "text folder":
        for i, text in enumerate(TEXTS):
            (folder / f"{i}.txt").write_text(text, encoding="utf-8")
        return folder
    if kind == "jsonl":
        file = folder / "texts.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
        return file
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    if kind == "parquet":
        rows.to_parquet(folder / "texts.parquet")
        return folder / "texts.parquet"
    if kind == "hub layout":
        (folder / "default").mkdir()
        rows.to_parquet(folder / "default" / "train-00000-of-00001.parquet")
        return folder
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("kind", ["text folder", "jsonl", "parquet", "hub layout", "save_to_disk"])
def test_every_kind_of_source_gives_the_same_tokens(tmp_path, kind):
    tokens = load_tokens(write(tmp_path, kind), "train", get_tokenizer("bytes"))
    texts = [text for text in TEXTS if text]
    assert bytes(np.where(tokens.ids == 256, 0, tokens.ids).astype(np.uint8)) == b"".join(
        t.encode() + b"\0" for t in texts
    )
    assert tokens.starts.tolist() == np.cumsum([0] + [len(t) + 1 for t in texts[:-1]]).tolist()
    assert tokens.largest == 256


def test_input_ids_are_taken_as_they_are_and_ended_once(tmp_path):
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 0], [70000]]})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "ids")
    tokens = load_tokens(tmp_path / "ids", "train", None)
    assert tokens.ids.tolist() == [5, 6, 7, 0, 8, 0, 70000, 0]
    tokens.check_vocabulary(70001)
    with pytest.raises(ValueError, match="the id 70000, outside the model's vocabulary of 70000"):
        tokens.check_vocabulary(70000)


def test_a_changed_source_is_encoded_again(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    assert len(load_tokens(file, "train", get_tokenizer("bytes")).ids) == 4
    file.write_text("three")
    assert len(load_tokens(file, "train", get_tokenizer("bytes")).ids) == 6


def test_validation_is_the_first_split_of_that_kind_or_none(tmp_path):
    assert len(load_validation(write(tmp_path, "save_to_disk"), get_tokenizer("bytes")).ids) == len("second") + 1
    (tmp_path / "a.txt").write_text("text")
    assert load_validation(tmp_path / "a.txt", get_tokenizer("bytes")) is None


def test_the_standard_library_is_split_by_file():
    train, held_out = (set(read_documents("stdlib", split)) for split in ("train", "validation"))
    assert len(train) > 10 * len(held_out) > 0
    assert not train & held_out


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: p / "absent", FileNotFoundError, "no data at"),
        (lambda p: p, ValueError, "has no split 'train'; it has no .txt"),
        (lambda p: _file(p / "a.csv", "x"), ValueError, "is none of .txt, .jsonl"),
        (
            lambda p: _file(p / "a.jsonl", '{"body": "x"}\n'),
            ValueError,
            "neither a column input_ids nor text, only body",
        ),
        (lambda p: _file(p / "a.txt", ""), ValueError, "is empty: not one document"),
        (lambda p: _file(p / "a.jsonl", '{"input_ids": [-1, 5]}\n'), ValueError, "ids from -1 to 5"),
    ],
)
def test_a_bad_source_is_one_sentence_and_leaves_nothing(tmp_path, make, error, message):
    source = make(tmp_path)
    with pytest.raises(error, match=message):
        load_tokens(source, "train", get_tokenizer("bytes"))
    assert not list((tmp_path / "cache").rglob("*"))


def _file(path, content):
    path.write_text(content)
    return path


def test_text_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="is text, and the model carries no tokenizer"):
        load_tokens(tmp_path / "a.txt", "train", None)


def test_articles_of_wikitext_begin_at_headings_of_the_first_level():
    lines = ["", " = One = \n", "", " text = more \n", " = = Part = = \n", " text \n", " = Two = \n", " text \n"]
    articles = list(wikitext_articles(iter(lines)))
    assert articles == [lines[:6], lines[6:]]


def tokens_of(count: int, starts=(0,)) -> Tokens:
    return Tokens(np.arange(1, count + 1, dtype=np.uint16), np.asarray(starts), eot_id=0, largest=count)


@pytest.mark.parametrize("count", [2, 4, 5, 9, 10, 23])
def test_every_token_but_the_first_is_a_target_once(count):
    windows = Windows(tokens_of(count), length=4)
    _, targets, _ = windows.batch(list(range(len(windows))))
    assert targets[targets != -100].tolist() == list(range(2, count + 1))


def test_inputs_stand_before_their_targets():
    inputs, targets, _ = Windows(tokens_of(10), length=4).batch([1, 2])
    assert inputs.tolist() == [[5, 6, 7, 8], [9, 10, 0, 0]]
    assert targets.tolist() == [[6, 7, 8, 9], [10, -100, -100, -100]]


def test_documents_restart_inside_a_window_unless_told_otherwise():
    tokens = tokens_of(12, starts=(0, 3, 6, 7))
    _, _, seq_idx = Windows(tokens, length=5).batch([0, 1])
    assert seq_idx.tolist() == [[1, 1, 1, 2, 2], [2, 3, 4, 4, 4]]
    assert Windows(tokens, length=5, reset=False).batch([0])[2] is None


def test_windows_in_which_no_document_begins_restart_nothing():
    windows = Windows(tokens_of(20, starts=(0, 8, 12)), length=4)
    assert windows.batch([0, 1, 2, 3])[2] is None  # documents begin where windows do
    assert Windows(tokens_of(20, starts=(0, 9)), length=4).batch([0, 2])[2].tolist() == [[1] * 4, [1, 2, 2, 2]]


def test_an_epoch_visits_every_window_once_in_an_order_of_its_own():
    windows = Windows(tokens_of(101), length=10)
    epochs = [windows.indices(seed=1, step=epoch, batch=10) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != windows.indices(seed=2, step=0, batch=10)


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_the_order_does_not_depend_on_the_batch_or_on_what_was_asked_before(batch):
    windows = Windows(tokens_of(101), length=10)
    flat = [i for step in range(21) for i in windows.indices(5, step, batch)]
    fresh = Windows(tokens_of(101), length=10)
    assert flat[:21] == fresh.indices(5, 0, 21)
    assert fresh.indices(5, 20, batch) == flat[20 * batch : 21 * batch]
    assert isinstance(fresh.batch(fresh.indices(5, 0, 2))[0], torch.Tensor)
