"""File names give the splits that `datasets` sees in them, and a held-out file is never used for training."""

import argparse
import contextlib
import itertools
import os
import random
import sys
from pathlib import Path, PurePosixPath

import datasets
import numpy as np
import pytest
from datasets.data_files import FILES_TO_IGNORE, SPLIT_KEYWORDS, DataFilesList, get_data_patterns

import eval as eval_script
from mamba2.data import NoSplit, describe, load_tokens, load_validation, open_source, read_documents
from mamba2.data.__main__ import main
from mamba2.data.splits import BOOKKEEPING, KEYWORDS, choose_split, splits_said
from mamba2.evaluation.corpus import load_corpus
from mamba2.tokenizer import get_tokenizer

BYTES, GPT2 = get_tokenizer("bytes"), get_tokenizer("gpt2")


def fill(folder: Path, names) -> Path:
    """Text files whose text is their name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def ours(folder: Path) -> dict[str, list[str]]:
    """The names of the files of each split."""
    found = {}
    for split in KEYWORDS:
        with contextlib.suppress(NoSplit):
            found[split] = sorted(read_documents(folder, split))
    return found


def theirs(folder: Path) -> dict[str, list[str]]:
    found = {}
    for split, patterns in get_data_patterns(str(folder)).items():
        files = DataFilesList.from_patterns(patterns, base_path=str(folder))
        found[str(split)] = sorted(str(PurePosixPath(file).relative_to(folder)) for file in files)
    return found


def test_the_words_are_those_of_datasets():
    assert {split: list(words) for split, words in KEYWORDS.items()} == {str(k): v for k, v in SPLIT_KEYWORDS.items()}
    assert {name for name in FILES_TO_IGNORE if name.endswith(".json")} <= set(BOOKKEEPING)


SHAPES = ["{}.txt", "{}/a.txt", "my_{}/a.txt", "{}-00001-of-00002.txt", "wiki.{}.txt", "{}_00.txt", "x/my {}2.txt"]
SHAPES += ["data_{}_sft.txt", "x/{}-v1/y/a.txt", "data/{}-00000-of-00001.txt", "v2{}.txt"]


@pytest.mark.parametrize("shape", SHAPES)
def test_names_say_what_datasets_reads_in_them(tmp_path, shape):
    words = [word for words in SPLIT_KEYWORDS.values() for word in words]
    for number, (first, second) in enumerate(zip(words, words[3:] + words[:3])):
        folder = fill(tmp_path / str(number), [shape.format(first), shape.format(second)])
        expected = theirs(folder)
        if "data/" in shape:  # there the name is the split; we know other words for it
            expected = {next(s for s, some in KEYWORDS.items() if name in some): f for name, f in expected.items()}
            if len(expected) < 2:
                continue
        assert ours(folder) == expected, (first, second)


HUB = "data/{}-00000-of-00001.txt"


@pytest.mark.parametrize(
    ("splits", "others"),
    [
        ({"train": ["train.txt"], "validation": ["valid.txt"]}, []),
        ({"train": ["train/a.txt"], "validation": ["valid/b.txt"]}, []),
        ({"train": [HUB.format("train_sft")], "test": [HUB.format("test_sft")]}, []),
        ({"train": ["Train.txt"], "validation": ["VALID.txt"]}, []),
        ({"train": ["train(1).txt"], "validation": ["val(1).txt"]}, []),
        ({"train": ["train/test_a.txt"], "test": ["test/train_b.txt"]}, []),
        ({"train": ["a.txt", "evaluate/b.txt", "latest.txt", "trained.txt"]}, []),
        ({"train": ["contest.txt", "developer/a.txt", "interval.txt", "testament.txt", "values.txt"]}, []),
        ({"train": ["train.txt"]}, ["other.txt", "extra/b.txt"]),
        ({"train": [HUB.format("train")]}, [HUB.format("unsupervised")]),
        ({"train": ["b/train.txt"], "validation": ["c/valid/x.txt"]}, []),
        ({"train": ["a.txt"]}, [".hidden/b.txt", "__MACOSX/c.txt", "._a.txt", ".ipynb_checkpoints/a.txt"]),
    ],
)
def test_files_go_where_their_names_say(tmp_path, splits, others):
    assert ours(fill(tmp_path / "source", itertools.chain(others, *splits.values()))) == splits


SEVERAL = ["train_test.txt", "train/val/a.txt", "test.train/b.txt", "eval_of_training.txt", HUB.format("train-dev")]
NONE = "has no split 'train'; it has"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        *((["train/a.txt", x], rf"{Path(x).name} says several splits, \w+ and \w+; rename it") for x in SEVERAL),
        (["a.txt", "valid.txt"], rf"{NONE} validation; .* move 1 file without .* \(a.txt\) into"),
        (["a.txt", "b.txt", "dev.txt"], rf"{NONE} validation; .* move 2 files without .* \(a.txt, b.txt\) into"),
        (["A.TXT", "b.csv"], rf"{NONE} no .txt, .* .parquet file, but 2 files with other endings \(A.TXT, b.csv\)$"),
        (["a.bin"], r"but 1 file with other endings \(a.bin\); a .bin file is read by its own path, or where its name"),
        (["test.txt"], f"{NONE} test; choose by name what to encode"),
        ([".x"], f"{NONE} no .txt, .jsonl, .json, .parquet file$"),
    ],
)
def test_files_that_cannot_be_trained_on_are_told_by_name(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        load_tokens(fill(tmp_path / "source", names), "train", BYTES)


@pytest.mark.parametrize("name", ["testset.txt", "TestData.txt", "tests/a.txt", "validationset/a.txt", "devs.txt"])
@pytest.mark.parametrize("shape", ["{}", "x/{}", "my_{}"])
def test_a_name_that_may_mean_held_out_is_not_trained_on(tmp_path, name, shape):
    folder = fill(tmp_path / "source", ["a.txt", "z/b.txt", shape.format(name)])
    with pytest.raises(ValueError, match=rf"may mean held out, and none .* \({shape.format(name)}\); move each into"):
        open_source(folder, "train")
    fill(folder, ["train/a.txt"])
    assert list(read_documents(folder, "train")) == ["train/a.txt"]


@pytest.mark.parametrize("names", [["members", "nonmembers"], ["trn", "tst"], ["corpus"]])
def test_in_the_layout_of_the_hub_any_name_is_a_split(tmp_path, names):
    folder = fill(tmp_path / "source", map(HUB.format, names))
    with pytest.raises(ValueError, match=f"has no split 'train'; it has {', '.join(names)}; choose by name"):
        open_source(folder, "train")
    for name in names:
        assert list(read_documents(folder, name)) == [HUB.format(name)]


def test_a_copy_of_a_file_held_out_is_left_out_of_training(tmp_path):
    folder, long = fill(tmp_path / "source", ["train/a.txt", "valid/a.txt"]), "x" * 5000
    for name, text in (("copy", long + "1"), ("same size", long + "2"), ("empty", "")):
        (folder / "train" / f"{name}.txt").write_text(text)
        (folder / "valid" / f"{name}.txt").write_text(text.replace("2", "3"))
    source = open_source(folder, "train")
    assert list(source.documents()) == ["train/a.txt", "", long + "2"]
    line = "left out     the same bytes as a file held out: 1 file (train/copy.txt)"
    assert line in describe({"train": {"split": "train", **source.told}})
    for name in ("a.txt", "same size.txt", "empty.txt"):
        (folder / "train" / name).unlink()
    message = r"has no split 'train'; it has validation; .* 1 file with the same bytes as a file held out \(train/copy"
    with pytest.raises(ValueError, match=message):
        open_source(folder, "train")


def test_a_split_is_found_by_another_word_and_not_guessed_among_several():
    assert choose_split("train", ["train_sft", "test_sft"], "x") == "train_sft"
    assert choose_split("dev", ["train", "validation"], "x") == "validation"
    assert choose_split("validation", ["train", "val", "val_extra"], "x") == "val"
    assert choose_split("train_gen", ["train_gen", "train_sft"], "x") == "train_gen"
    with pytest.raises(ValueError, match="x has several splits that say train: train_gen, train_sft; choose by name"):
        choose_split("train", ["train_gen", "train_sft"], "x")
    for asked in ("train_gen", "val", "other"):
        with pytest.raises(ValueError, match=f"x has no split '{asked}'; it has train_sft, test, validation_test"):
            choose_split(asked, ["train_sft", "test", "validation_test"], "x")


def test_the_plan_names_what_goes_where_and_what_is_left_out(tmp_path, capsys, monkeypatch):
    names = ["train/a.txt", "train/b.txt", "train/c.txt", "train/d.txt", "dev/e.txt", "test.txt", "notes.txt"]
    folder = fill(tmp_path / "source", [*names, "train/._a.txt", "table.csv", "dataset_infos.json"])
    (folder / "train" / "empty.txt").touch()
    train, held_out = load_tokens(folder, "train", BYTES), load_validation(folder, BYTES)
    assert (len(train.starts), train.empty) == (4, 1)
    lines = [
        "train        split train: 5 files, 44 bytes (train/a.txt, train/b.txt, train/c.txt, …)",
        "val          split validation: 1 file, 9 bytes (dev/e.txt)",
        "left out     split test: 1 file, 8 bytes (test.txt)",
        "left out     bookkeeping: 1 file (dataset_infos.json)",
        "left out     not .txt, .jsonl, .json, .parquet: 1 file (table.csv)",
        "left out     hidden: 1 file (train/._a.txt)",
        "left out     no split in the name, and others have one: 1 file (notes.txt)",
    ]
    assert describe({"train": train.source, "val": held_out.source}) == lines
    arguments = ["mamba2.data", str(folder), "--tokenizer", "bytes", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[:7] == lines and "train.bin: 1 empty documents were left out" in printed
    assert load_tokens(tmp_path / "out", "train", BYTES).source == train.source


def test_splits_of_saved_data_sets_are_found_by_what_their_names_say(tmp_path):
    rows, held_out = (datasets.Dataset.from_dict({"text": [text]}) for text in ("one", "held out"))
    datasets.DatasetDict({"train": rows, "valid": held_out, "extra": rows}).save_to_disk(tmp_path / "saved")
    assert len(load_validation(tmp_path / "saved", BYTES).ids) == 9
    train = load_tokens(tmp_path / "saved", "train", BYTES)
    assert describe({"train": train.source})[-1] == "left out     split extra: 1 row"
    datasets.DatasetDict({"heldout": rows}).save_to_disk(tmp_path / "other")
    datasets.Dataset.from_dict({"text": ["one"]}, split="test").save_to_disk(tmp_path / "alone")
    for folder, split in ((tmp_path / "other" / "heldout", "heldout"), (tmp_path / "alone", "test")):
        with pytest.raises(ValueError, match=f"has no split 'train'; it has {split}; choose by name"):
            load_tokens(folder, "train", BYTES)
        assert list(read_documents(folder, split)) == ["one"]


def test_token_files_of_others_are_told_apart_by_the_same_words(tmp_path):
    for number, name in enumerate(["train.bin", "valid.bin", "test.bin", "meta.bin"]):
        np.asarray([number, 50256], dtype="<u2").tofile(tmp_path / name)
    train, held_out = load_tokens(tmp_path, "train", GPT2), load_validation(tmp_path, GPT2)
    assert (train.ids.tolist(), held_out.ids.tolist()) == ([0, 50256], [1, 50256])
    lines = describe({"train": train.source, "held out": held_out.source})
    assert "left out     split test: 1 file, 4 bytes (test.bin)" in lines
    assert "left out     no split in the name, and others have one: 1 file (meta.bin)" in lines
    (tmp_path / "train_val.bin").touch()
    with pytest.raises(ValueError, match=r"train_val\.bin says several splits, train and validation"):
        load_tokens(tmp_path, "train", GPT2)


def test_links_are_followed_and_loops_end(tmp_path):
    elsewhere = fill(tmp_path / "elsewhere", ["a.txt", "deep/b.txt"])
    folder = fill(tmp_path / "source", ["train/c.txt"])
    (folder / "train" / "linked").symlink_to(elsewhere)
    (folder / "train" / "loop").symlink_to(folder)
    (elsewhere / "deep" / "up").symlink_to(elsewhere)
    (folder / "valid").mkdir()
    (folder / "valid" / "d.txt").symlink_to(fill(tmp_path, ["d.txt"]) / "d.txt")
    assert ours(folder) == {"train": ["a.txt", "deep/b.txt", "train/c.txt"], "validation": ["d.txt"]}
    before = open_source(folder, "train").revision
    (elsewhere / "deep" / "b.txt").write_text("changed")
    assert open_source(folder, "train").revision != before
    told = open_source(folder, "train").told["left_out"]
    assert told["folders that are not entered"]["names"] == "train/linked/deep/up, train/loop"
    (folder / "b.txt").symlink_to("gone")
    with pytest.raises(FileNotFoundError, match=r"b\.txt is a link to gone, which is not there"):
        open_source(folder, "train")


def test_one_file_is_not_in_two_splits_and_not_twice_in_one(tmp_path):
    folder = fill(tmp_path / "source", ["train/a.txt", "valid/b.txt"])
    (folder / "train" / "same.txt").symlink_to("a.txt")
    assert ours(folder)["train"] == ["train/a.txt"]
    os.link(folder / "valid" / "b.txt", folder / "train" / "b.txt")
    with pytest.raises(ValueError, match=r"train/b.txt and .*valid/b.txt are the same file, once in train and once in"):
        open_source(folder, "train")


def test_a_file_and_a_source_of_one_split_are_evaluated_without_naming_it(tmp_path):
    folder = fill(tmp_path, ["a.txt", "source/valid.txt", "several/train.txt", "several/valid.txt"])
    assert load_corpus(str(folder / "a.txt"), "test").split == "train"
    assert load_corpus(str(folder / "source"), None).split == "validation"
    with pytest.raises(ValueError, match="has no split 'test'; it has validation"):
        load_corpus(str(folder / "source"), "test")
    with pytest.raises(ValueError, match="has no split 'test'; it has train, validation"):
        load_corpus(str(folder / "several"), None)


def test_eval_says_which_split_it_takes_where_there_is_one(tmp_path, capsys):
    folder = fill(tmp_path, ["a.txt", "one/valid.txt", "several/train.txt", "several/test.txt"])
    options = {"dataset_config_name": [None] * 2, "max_tokens": None}

    def corpora(*names, splits=None):
        given = {"any_split": splits is None, "dataset_split": splits or ["test"]}
        args = argparse.Namespace(dataset_name=[str(folder / name) for name in names], **options, **given)
        found = [(Path(corpus.name).name, corpus.split) for corpus in eval_script.load_corpora(args, BYTES)]
        return found, capsys.readouterr().out.count("is evaluated")

    assert corpora("a.txt", "one") == ([("a.txt", "train"), ("one", "validation")], 2)
    assert corpora("several", "a.txt") == ([("several", "test"), ("a.txt", "train")], 1)
    asked = corpora("several", "a.txt", splits=["test", "train"])
    assert asked == ([("several", "test"), ("several", "train"), ("a.txt", "train")], 1)


def test_random_trees_never_train_on_what_datasets_holds_out(tmp_path):
    """Every file is where `datasets` has it, or left out, or the folder is refused; ours may find more files."""
    generator = random.Random(0)
    words = [*itertools.chain(*SPLIT_KEYWORDS.values()), "wiki", "a", "books", "latest", "data", "part"]
    compared = refused = 0
    for number in range(40):
        names = set()
        for _ in range(generator.randint(1, 6)):
            depth = generator.choice([1, 1, 2, 3])
            separator = generator.choice("-._ 07")
            parts = [separator.join(generator.choices(words, k=generator.choice([1, 1, 2]))) for _ in range(depth)]
            names.add("/".join(parts) + generator.choice([".txt", ".txt", "-00000-of-00002.txt"]))
        folder = fill(tmp_path / str(number), sorted(names))
        try:
            found = ours(folder)
        except ValueError as error:
            two_in_one_path = any(len(splits_said(name)) > 1 for name in names)
            assert "has several splits that say" in str(error) or ("says several" in str(error) and two_in_one_path)
            refused += 1
            continue
        expected = theirs(folder)
        held_out = {*expected.get("validation", []), *expected.get("test", [])}
        assert not held_out & set(found.get("train", [])), (names, found, expected)
        if expected.keys() <= KEYWORDS.keys():
            assert all(set(files) <= set(found.get(split, [])) for split, files in expected.items()), (found, expected)
            compared += 1
    assert compared > 12 and refused > 3, (compared, refused)
