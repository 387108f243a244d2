"""Ids against the `tokenizers` library, on vocabularies rebuilt for it from the ranks that are shipped."""

import random
import sysconfig
import unicodedata
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from mamba2.tokenizer import _shipped, get_tokenizer
from mamba2.tokenizer_json import find_merges
from mamba2.tokenizer_reader import byte_characters

NAMES = ["bytes", "gpt2", "gpt-neox-20b"]
ATOMS = [*(" " * n for n in (1, 2, 23, 24, 25, 49)), *"\n\t\r\x1c\x85\u00a0\u2003é\u0308\u212bﬁ😀x\x00!_"]
ATOMS += ["\n\n", "e\u0301", "👩‍👧", "中文", "한글", "\u1112\u1161", "foo", "Bar", "123", "def f(x):", "...", "'ll"]
ATOMS += ["it's", "<|endoftext|", "naïve", "  # comment", "://", "0x1F"]


@pytest.fixture(scope="session", params=["gpt2", "gpt-neox-20b"])
def pair(request):
    """Our tokenizer, and the library's with the same vocabulary."""
    neox = request.param == "gpt-neox-20b"
    characters = {byte: character for character, byte in byte_characters().items()}

    def visible(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    ranks = {token: rank for rank, token in enumerate(_shipped(request.param), start=2 if neox else 0)}
    vocabulary = {visible(token): i for token, i in ranks.items()} | {"<|endoftext|>": 0 if neox else 50256}
    merges = [(visible(a), visible(b)) for a, b in find_merges(ranks)]
    special, spaces = ["<|endoftext|>"], []
    if neox:
        vocabulary |= {"<|padding|>": 1, **{" " * (24 - k): 50254 + k for k in range(23)}}
        special, spaces = [*special, "<|padding|>"], [" " * k for k in range(24, 1, -1)]
    library = Library(models.BPE(vocabulary, merges))
    if neox:
        library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    library.add_tokens([AddedToken(name, special=False, normalized=True) for name in spaces])
    return get_tokenizer(request.param), library


def random_texts(count: int) -> list[str]:
    generator = random.Random(0)
    return ["".join(generator.choices(ATOMS, k=generator.randint(0, 25))) for _ in range(count)]


def test_random_strings_get_the_ids_of_the_library_and_come_back(pair):
    ours, library = pair
    for text in random_texts(5000):
        ids = ours.encode(text)
        assert ids == library.encode(text).ids, repr(text)
        assert ours.decode(ids) == (unicodedata.normalize("NFC", text) if ours.name == "gpt-neox-20b" else text)


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


LONG = {"gpt2": 1_050_000, "gpt-neox-20b": 600_000}  # white space, more than tiktoken's engine holds in one piece


def test_a_million_newlines_get_the_ids_of_the_library(pair):
    assert_long(pair, "x" + "\n" * LONG[pair[0].name] + "y")


@pytest.mark.slow
@pytest.mark.parametrize("run", [" ", "\t \n", " \n \n", "  \n", "\u2003\x0b", "\x1c", *"a1!é中", "ab1 "])
def test_other_long_runs_get_the_ids_of_the_library(pair, run):
    """The built-in patterns have no limit for other characters, so a quarter of the length is enough."""
    times = LONG[pair[0].name] // len(run)
    if run.isspace():
        assert_long(pair, "x" + run * times + "y  z")
        assert_long(pair, "... " + run * times)
    else:
        assert_long(pair, "x" + run * (times // 4) + "y  z")


def test_white_space_cut_out_gets_the_ids_of_the_library(pair, monkeypatch):
    monkeypatch.setattr("mamba2.tokenizer.BLOCK", 25)
    ours, library = pair
    generator = random.Random(1)
    signs = [*" \n\t\r\x85\xa0\x1c", "  ", " " * 24, " " * 25, "\n\n"]
    for _ in range(1000):
        text = ""
        for _ in range(3):
            text += "".join(generator.choices(signs[: generator.randint(1, 11)], k=generator.randint(0, 120)))
            text += generator.choice(["a", "1", "!", "é", " b", ""])
        assert ours.encode(text) == library.encode(text).ids, repr(text)


def test_a_tokenizer_json_gives_the_ids_of_the_library(pair, tmp_path):
    _, library = pair
    library.save(str(tmp_path / "tokenizer.json"))
    ours = get_tokenizer(tmp_path)
    assert ours.vocab_size == library.get_vocab_size()
    for text in random_texts(1000):
        assert ours.encode(text) == library.encode(text).ids, repr(text)


SIZES = {"bytes": (256, 257), "gpt2": (50256, 50257), "gpt-neox-20b": (0, 50277)}


@pytest.mark.parametrize("name", NAMES)
def test_ids_of_the_built_in_tokenizers(name):
    tokenizer = get_tokenizer(name)
    eot = tokenizer.eot_id
    assert (eot, tokenizer.vocab_size) == SIZES[name]
    assert tokenizer.decode([]) == tokenizer.decode([eot]) == "" and tokenizer.encode("") == []
    assert eot not in tokenizer.encode("a<|endoftext|>b")  # a document cannot end itself
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"  # a lone surrogate
    assert all(tokenizer.decode_bytes([i]) or i == eot for i in range(tokenizer.vocab_size))


DOCUMENTS = ["a  b", "\u0338 begins with a mark that would join", "<|end of document|>", "x<|padding|>  y"]
DOCUMENTS += ["b\ud800", " " * 49]


@pytest.mark.parametrize("documents", [DOCUMENTS, DOCUMENTS[:2], *([text] for text in DOCUMENTS), []])
@pytest.mark.parametrize("name", NAMES)
def test_documents_encoded_together_get_the_ids_of_each(name, documents):
    tokenizer = get_tokenizer(name)
    expected = [i for text in documents for i in (*tokenizer.encode(text), tokenizer.eot_id)]
    assert tokenizer.encode_documents(documents).tolist() == expected


def test_an_unknown_name_or_id_is_named():
    with pytest.raises(ValueError, match="id 300 is not in the vocabulary of bytes"):
        get_tokenizer("bytes").decode([65, 300])
    with pytest.raises(ValueError, match="no tokenizer 'gpt3': choose bytes, gpt2, gpt-neox-20b"):
        get_tokenizer("gpt3")
