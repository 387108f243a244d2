"""Ids against the `tokenizers` library, on vocabularies rebuilt for it from the ranks that are shipped."""

import itertools
import json
import random
import sysconfig
import unicodedata
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from mamba2.tokenizer import (
    _shipped,
    find_tokenizer,
    get_tokenizer,
    load_tokenizer,
    save_tokenizer,
)
from mamba2.tokenizer_reader import byte_characters

ATOMS = [
    " ",
    "  ",
    " " * 23,
    " " * 24,
    " " * 25,
    " " * 49,
    "\n",
    "\n\n",
    "\t",
    "\r",
    "\x1c",
    "\x85",
    "\u00a0",
    "\u2003",
]
ATOMS += [
    "é",
    "e\u0301",
    "\u0308",
    "\u212b",
    "ﬁ",
    "😀",
    "👩‍👧",
    "中文",
    "한글",
    "\u1112\u1161",
    "x",
    "foo",
    "Bar",
    "123",
    "\x00",
]
ATOMS += ["def f(x):", "!", "...", "'ll", "it's", "_", "<|endoftext|", "naïve", "  # comment", "://", "0x1F"]


def merges_of(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of more than one byte was merged from: what is left when only earlier merges apply."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for token, rank in ranks.items():
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
            best, i = min(pairs)
            assert best < rank
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


@pytest.fixture(scope="session", params=["gpt2", "gpt-neox-20b"])
def pair(request):
    """Our tokenizer, and the library's with the same vocabulary."""
    tokens = _shipped(request.param)
    first = 2 if request.param == "gpt-neox-20b" else 0
    characters = {byte: character for character, byte in byte_characters().items()}

    def visible(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    vocabulary = {visible(token): first + rank for rank, token in enumerate(tokens)}
    added = [AddedToken("<|endoftext|>", special=True, normalized=False)]
    if first:
        vocabulary |= {"<|endoftext|>": 0, "<|padding|>": 1}
        vocabulary |= {" " * (24 - k): 50254 + k for k in range(23)}
        added += [AddedToken("<|padding|>", special=True, normalized=False)]
        added += [AddedToken(" " * k, special=False, normalized=True) for k in range(24, 1, -1)]
    else:
        vocabulary["<|endoftext|>"] = 50256
    merges = [(visible(a), visible(b)) for a, b in merges_of(tokens)]
    library = Library(models.BPE(vocabulary, merges))
    if first:
        library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([token for token in added if token.special])
    library.add_tokens([token for token in added if not token.special])
    return get_tokenizer(request.param), library


def random_texts(count: int) -> list[str]:
    generator = random.Random(0)
    return ["".join(generator.choices(ATOMS, k=generator.randint(0, 25))) for _ in range(count)]


def test_random_strings_get_the_ids_of_the_library(pair):
    ours, library = pair
    for text in random_texts(5000):
        assert ours.encode(text) == library.encode(text).ids, repr(text)


def test_real_text_gets_the_ids_of_the_library_and_comes_back(pair):
    ours, library = pair
    folder = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse.py", "ast.py", "json/decoder.py", "string.py"):
        text = (folder / name).read_text(encoding="utf-8")
        ids = ours.encode(text)
        assert ids == library.encode(text).ids
        assert ours.decode(ids) == library.decode(ids, skip_special_tokens=True) == text


def assert_long(pair, text):
    ours, library = pair
    ids = ours.encode(text)
    assert ids == library.encode(text).ids
    short = [*ours.encode("a b"), ours.eot_id]
    assert ours.encode_documents(["a b", text, "", "a b"]).tolist() == [*short, *ids, ours.eot_id, ours.eot_id, *short]


LONG = 1_050_000  # signs of white space, more than the engine that splits text holds in one piece


def test_a_million_newlines_get_the_ids_of_the_library(pair):
    assert_long(pair, "x" + "\n" * LONG + "y")


@pytest.mark.slow
@pytest.mark.parametrize(
    "run", [" ", "\t \n", " \n \n", "  \n", "\u2003\x0b", "\x1c", "a", "1", "!", "é", "ab1 ", "中"]
)
def test_other_long_runs_get_the_ids_of_the_library(pair, run):
    """Where the engine's stack does not grow with the run, a quarter of the length shows it."""
    times = LONG // len(run) // (1 if run.isspace() else 4)
    assert_long(pair, "x" + run * times + "y  z")
    assert_long(pair, "... " + run * times)


def test_white_space_cut_out_gets_the_ids_of_the_library(pair, monkeypatch):
    monkeypatch.setattr("mamba2.tokenizer.BLOCK", 25)
    ours, library = pair
    generator = random.Random(1)
    signs = [*" \n\t\r\x85\xa0\x1c", "  ", " " * 24, " " * 25, "\n\n"]
    for _ in range(1000):
        stretch = (
            "".join(generator.choices(signs[: generator.randint(1, 11)], k=generator.randint(0, 120))) for _ in "123"
        )
        text = "".join(white + generator.choice(["a", "1", "!", "é", " b", ""]) for white in stretch)
        assert ours.encode(text) == library.encode(text).ids, repr(text)


def test_text_comes_back(pair):
    ours, _ = pair
    normalise = unicodedata.normalize if ours.name == "gpt-neox-20b" else lambda _, text: text
    for text in random_texts(500):
        assert ours.decode(ours.encode(text)) == normalise("NFC", text)


def test_a_tokenizer_json_gives_the_ids_of_the_library(pair, tmp_path):
    _, library = pair
    library.save(str(tmp_path / "tokenizer.json"))
    ours = get_tokenizer(tmp_path)
    assert ours.vocab_size == library.get_vocab_size()
    for text in random_texts(1000):
        assert ours.encode(text) == library.encode(text).ids, repr(text)


@pytest.mark.parametrize(
    ("name", "eot", "size"), [("bytes", 256, 257), ("gpt2", 50256, 50257), ("gpt-neox-20b", 0, 50277)]
)
def test_ids_of_the_built_in_tokenizers(name, eot, size):
    tokenizer = get_tokenizer(name)
    assert (tokenizer.eot_id, tokenizer.vocab_size) == (eot, size)
    assert tokenizer.decode([]) == "" and tokenizer.encode("") == []
    assert tokenizer.decode([eot]) == ""


@pytest.mark.parametrize("name", ["bytes", "gpt2", "gpt-neox-20b"])
def test_a_document_cannot_end_itself(name):
    tokenizer = get_tokenizer(name)
    assert tokenizer.eot_id not in tokenizer.encode("a<|endoftext|>b")


@pytest.mark.parametrize("name", ["bytes", "gpt2", "gpt-neox-20b"])
def test_a_lone_surrogate_counts_as_the_replacement_character(name):
    tokenizer = get_tokenizer(name)
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


DOCUMENTS = [
    "a  b",
    "\u0338 begins with a mark that would join",
    "<|end of document|>",
    "x<|padding|>  y",
    "b\ud800",
    " " * 49,
]


@pytest.mark.parametrize("documents", [DOCUMENTS, DOCUMENTS[:2], *([text] for text in DOCUMENTS), []])
@pytest.mark.parametrize("name", ["bytes", "gpt2", "gpt-neox-20b"])
def test_documents_encoded_together_get_the_ids_of_each(name, documents):
    tokenizer = get_tokenizer(name)
    expected = [i for text in documents for i in (*tokenizer.encode(text), tokenizer.eot_id)]
    assert tokenizer.encode_documents(documents).tolist() == expected


@pytest.mark.parametrize("name", ["bytes", "gpt2", "gpt-neox-20b"])
def test_every_id_has_its_bytes(name):
    tokenizer = get_tokenizer(name)
    assert all(tokenizer.decode_bytes([i]) or i == tokenizer.eot_id for i in range(tokenizer.vocab_size))


def test_an_unknown_id_is_named():
    with pytest.raises(ValueError, match="id 300 is not in the vocabulary of bytes"):
        get_tokenizer("bytes").decode([65, 300])


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="no tokenizer 'gpt3': choose bytes, gpt2, gpt-neox-20b"):
        get_tokenizer("gpt3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "normalizer Lowercase is not supported"),
        (lambda d: d["pre_tokenizer"].update(type="Metaspace"), "this pre_tokenizer is not supported"),
        (lambda d: d["model"].update(merges=d["model"]["merges"][::-1]), "is not in the order of the ids"),
        (lambda d: d.update(added_tokens=[]), "no end-of-text token"),
        (lambda d: d.pop("model"), "is not a BPE tokenizer.json"),
    ],
)
def test_what_is_not_supported_in_a_tokenizer_json_is_named(pair, tmp_path, change, message):
    description = json.loads(pair[1].to_str())
    change(description)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        get_tokenizer(file)


def test_a_model_folder_carries_its_tokenizer(pair, tmp_path):
    ours, library = pair
    (tmp_path / "named").mkdir()
    save_tokenizer(ours, tmp_path / "named")
    assert load_tokenizer(tmp_path / "named") is ours
    library.save(str(tmp_path / "tokenizer.json"))
    by_file = get_tokenizer(tmp_path)
    (tmp_path / "copied").mkdir()
    save_tokenizer(by_file, tmp_path / "copied")
    assert load_tokenizer(tmp_path / "copied").identity == by_file.identity != ours.identity
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="carries no tokenizer"):
        load_tokenizer(tmp_path / "empty")
    assert find_tokenizer(tmp_path / "empty") is None
    for record in ("", "[]", '{"name": ["gpt2"]}', '{"name": "gpt3"}'):
        (tmp_path / "empty" / "mamba2_tokenizer.json").write_text(record)
        with pytest.raises(ValueError, match="names no tokenizer; its name must be one of bytes"):
            find_tokenizer(tmp_path / "empty")
    (tmp_path / "empty" / "mamba2_tokenizer.json").unlink()
    (tmp_path / "empty" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json"):
        find_tokenizer(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"no model folder at .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
