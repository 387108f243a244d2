"""Token files: ours and others' read as they are, and refused when they are not what they should be."""

import json

import numpy as np
import pytest

from mamba2.data import Plan, Tokens, Windows, load_tokens, load_validation, open_source, prepare
from mamba2.data.tokens import Shards
from mamba2.tokenizer import get_tokenizer

BYTES, GPT2 = get_tokenizer("bytes"), get_tokenizer("gpt2")


@pytest.fixture
def prepared(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(50)))
    source = open_source(tmp_path / "a.jsonl", "train")
    prepare(tmp_path / "prepared", Plan({"train": source}, BYTES, validation_documents=3))
    return tmp_path / "prepared"


def test_a_prepared_folder_is_mapped_and_its_content_hash_told(prepared):
    tokens = load_tokens(prepared, "train", BYTES)
    assert isinstance(tokens.ids, np.memmap) and isinstance(tokens.starts, np.memmap)
    sidecar = json.loads((prepared / "tokens.json").read_text())
    assert tokens.sha256 == sidecar["splits"]["train"]["sha256"] != load_validation(prepared, BYTES).sha256
    assert sidecar["vocab_size"] == 257 and sidecar["eot_id"] == 256 and sidecar["dtype"] == "<u2"
    assert sidecar["tokenizer"] == {"name": "bytes", "identity": "bytes"}
    tokens.verify()
    with pytest.raises(ValueError, match="has no split 'test'; it has train, val"):
        load_tokens(prepared, "test", BYTES)
    with pytest.raises(ValueError, match="was made with the tokenizer bytes, and the model has gpt2"):
        load_tokens(prepared, "train", GPT2)
    assert load_tokens(prepared, "train", None).eot_id == 256


def test_the_content_hash_is_the_same_through_the_cache_and_without_files(prepared, tmp_path):
    through_cache = load_tokens(tmp_path / "a.jsonl", "train", BYTES)
    in_memory = Tokens(np.array(through_cache.ids), through_cache.starts, 256, 256)
    assert through_cache.sha256 == in_memory.sha256 != load_tokens(prepared, "train", BYTES).sha256
    in_memory.verify()


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "train.bin").write_bytes((f / "train.bin").read_bytes()[:-2]), "cut short or changed"),
        (lambda f: flip(f / "train.bin", 5), "first or last MiB has another hash"),
        (lambda f: (f / "train.starts").write_bytes(b"12345678"), "bytes instead of 376: damaged"),
        (lambda f: (f / "train.bin").unlink(), "is missing"),
        (lambda f: (f / "tokens.json").write_text("{"), "tokens.json is damaged"),
        (lambda f: (f / "tokens.json").write_text('{"format": 9, "splits": {}}'), "has format 9"),
    ],
)
def test_a_folder_that_is_not_what_its_sidecar_says_is_refused(prepared, change, message):
    change(prepared)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_tokens(prepared, "train", BYTES)


def test_a_change_in_the_middle_is_found_by_verify_only(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"0123456789abcdef" * 2**17)
    prepare(tmp_path / "prepared", Plan({"train": open_source(tmp_path / "a.txt", "train")}, BYTES))
    flip(tmp_path / "prepared" / "train.bin", 2**21)
    tokens = load_tokens(tmp_path / "prepared", "train", BYTES)
    with pytest.raises(ValueError, match=r"train\.bin changed"):
        tokens.verify()


# ----------------------------------------------------------------------------------------------------------- of others


def raw(file, ids):
    np.asarray(ids, dtype="<u2").tofile(file)
    return file


def shard(file, ids, magic=20240520, version=1, count=None):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    file.write_bytes(header.tobytes() + np.asarray(ids, dtype="<u2").tobytes())
    return file


def test_nanogpt_files_are_read_where_they_lie(tmp_path, monkeypatch):
    monkeypatch.setattr("mamba2.data.foreign.PIECE", 2)  # ids scanned at a time
    raw(tmp_path / "train.bin", [5, 50256, 6, 7, 50256, 8, 50256])
    raw(tmp_path / "val.bin", [9, 9])
    train, val = load_tokens(tmp_path, "train", GPT2), load_validation(tmp_path, GPT2)
    assert isinstance(train.ids, np.memmap) and train.ids.filename == tmp_path / "train.bin"
    assert (train.ids.tolist(), train.starts.tolist()) == ([5, 50256, 6, 7, 50256, 8, 50256], [0, 2, 5])
    assert (val.ids.tolist(), val.starts.tolist(), val.largest) == ([9, 9], [0], 9)
    assert load_tokens(tmp_path / "val.bin", "train", GPT2).ids.tolist() == [9, 9]
    assert load_validation(tmp_path / "val.bin", GPT2) is None
    with pytest.raises(ValueError, match="the id 50256, outside the model's vocabulary of 257"):
        train.check_vocabulary(257)
    train.verify()
    with pytest.raises(ValueError, match="does not say which id ends a document"):
        load_tokens(tmp_path, "train", None)


def test_shards_of_llm_c_are_one_sequence(tmp_path, monkeypatch):
    monkeypatch.setattr("mamba2.data.foreign.PIECE", 2)
    shard(tmp_path / "fineweb_train_000002.bin", [4, 50256, 5, 6])
    shard(tmp_path / "fineweb_train_000001.bin", [50256, 1, 2, 50256, 3])
    shard(tmp_path / "fineweb_val_000000.bin", [50256, 7])
    tokens = load_tokens(tmp_path, "train", GPT2)
    assert np.asarray(tokens.ids).tolist() == [50256, 1, 2, 50256, 3, 4, 50256, 5, 6]
    assert tokens.starts.tolist() == [0, 1, 4, 7] and (tokens.eot_id, tokens.largest) == (50256, 50256)
    assert load_validation(tmp_path, None).ids.tolist() == [50256, 7]
    inputs, targets, seq_idx = Windows(tokens, 4).batch([0, 1])
    assert inputs.tolist() == [[50256, 1, 2, 50256], [3, 4, 50256, 5]]
    assert targets.tolist() == [[1, 2, 50256, 3], [4, 50256, 5, 6]]
    assert seq_idx.tolist() == [[1, 2, 2, 2], [3, 3, 3, 4]]
    tokens.verify()
    with pytest.raises(ValueError, match="holds ids of the tokenizer gpt2, and the model has gpt-neox-20b"):
        load_tokens(tmp_path, "train", get_tokenizer("gpt-neox-20b"))


def test_any_slice_of_shards_is_that_of_the_whole():
    whole = np.arange(12, dtype=np.uint16)
    shards = Shards([whole[:3], whole[3:4], whole[4:]])
    assert len(shards) == 12 and shards[12:20].dtype == np.uint16
    for start in range(14):
        for stop in range(16):
            assert shards[start:stop].tolist() == whole[start:stop].tolist()


def test_the_documents_of_a_file_are_found_once_and_again_when_it_changes(tmp_path, monkeypatch):
    raw(tmp_path / "train.bin", [1, 50256, 2])
    first = load_tokens(tmp_path, "train", GPT2)
    with monkeypatch.context() as patch:
        patch.setattr("mamba2.data.foreign._index", None)
        assert load_tokens(tmp_path, "train", GPT2).sha256 == first.sha256
    raw(tmp_path / "train.bin", [1, 50256, 3, 50256, 4])
    changed = load_tokens(tmp_path, "train", GPT2)
    assert changed.sha256 != first.sha256 and changed.starts.tolist() == [0, 2, 4]
    assert load_tokens(tmp_path, "train", BYTES).starts.tolist() == [0]  # another end of text


LFS = b"version https://git-lfs.github.com/spec/v1\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: shard(p / "a_train_1.bin", [1, 2], magic=20240801), "begins with 20240801 and not with 20240520"),
        (lambda p: shard(p / "a_train_1.bin", [1, 2], version=7), "of version 7; version 1"),
        (lambda p: shard(p / "a_train_1.bin", [1, 2], count=3), "its header says 3 tokens: it is cut short"),
        (lambda p: shard(p / "a_train_1.bin", []), "cut short or empty"),
        (lambda p: (raw(p / "train.bin", [1]), shard(p / "x_train.bin", [1])), "begins with nothing"),
        (
            lambda p: (raw(p / "train.bin", [1]), raw(p / "train2.bin", [1])),
            "split of raw ids is one file, and here it is 2: train.bin, tr",
        ),
        (lambda p: (p / "train.bin").write_bytes(b"abc"), "has 3 bytes: uint16 ids take an even number"),
        (lambda p: (p / "train.bin").write_bytes(b""), "has 0 bytes"),
        (lambda p: (p / "train.bin").write_bytes(LFS), "pointer of Git LFS"),
        (lambda p: raw(p / "val.bin", [1]), "has no split 'train'; it has val"),
    ],
)
def test_a_bad_token_file_is_named(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_tokens(tmp_path, "train", GPT2)
    assert not list((tmp_path / "cache").rglob("*"))
