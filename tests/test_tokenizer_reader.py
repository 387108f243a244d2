"""Every tokenizer.json gets the ids of the `tokenizers` library, or one sentence on loading."""

import copy
import json
import random

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, trainers

from mamba2.tokenizer import find_tokenizer, get_tokenizer, load_tokenizer, save_tokenizer
from mamba2.tokenizer_reader import GPT2_SPLIT, LLAMA3_SPLIT, QWEN2_SPLIT

GPT4O_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FAMILIES = [GPT2_SPLIT, LLAMA3_SPLIT, QWEN2_SPLIT, GPT4O_SPLIT]
SIMPLE = [r"\d", r"\p{N}{1,3}", r"\d{2}", r"[A-Za-z]+", r"\s+", r" ?\p{L}+|\s+(?!\S)", r"\p{L}++(?=\s)|[!?]", "ab|b"]
SIMPLE += ["(?:ab)+", r"(?:\d|a+)b?", r"\d{1,3}(?=(?:\d{3})*)"]
FOREIGN = [r"\w+", "(?i:ss)", "^a", "a$", ".", r"\p{N}{1,3}+", "[a-z&&[^b]]", "(?<=a)b", "(a", r"\d*", r"(?!\S)", ""]
FOREIGN += ["(a+)+b", "(?:a|aa)+b", "((ab*)){2,}c"]
PIECES = [*"abéßſK²!_\u0301\u00a0'\t\n\x1c\x85 ", "ab", "the", "In", "12", "345", "e\u0301", "中文", "😀", "'s", "'S"]
PIECES += ["'ll", "'LL", "?!", "...", "<x>", "<y>", "<|endoftext|>", "theIn", "abab", "\r\n", "\n\n"]
PIECES += [" ", " ", "  ", "  ", "    "]


def texts(seed: int, count: int) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices(PIECES, k=generator.randint(0, 30))) for _ in range(count)]


@pytest.fixture(scope="session")
def trained() -> str:
    """A small BPE with all bytes, trained by the library."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "show_progress": False, "special_tokens": ["<|endoftext|>", "<s>"]}
    words = ["the cat in the hat sat, 12 34 345's they'll ab abab aabb    x\n\n  \t y é 中文 "] * 3
    library.train_from_iterator(words + texts(0, 300), trainers.BpeTrainer(vocab_size=420, **options))
    return library.to_str()


@pytest.fixture
def description(trained) -> dict:
    return json.loads(trained)


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
TEXT, BOS = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<s>", "type_id": 0}}
TEXT_B = {"Sequence": {"id": "B", "type_id": 0}}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [BOS, BOS, TEXT],
    "pair": [TEXT],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}
ROBERTA = {"type": "RobertaProcessing", "sep": ["<s>", 1], "cls": ["<s>", 1], "trim_offsets": True}
NFC, DIGITS = {"type": "NFC"}, {"type": "Digits", "individual_digits": True}


def sequence(key: str, *steps: dict) -> dict:
    return {"type": "Sequence", key: list(steps)}


def split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}
    return sequence("pretokenizers", step, LEVEL | {"use_regex": False})


def added(i: int, content: str, **flags) -> dict:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": i, "content": content, **plain, **flags}


def every_merge(description: dict) -> None:
    """Make each pair of tokens that makes a token a merge, as in files that are converted from tiktoken's."""
    model = description["model"]
    ids = {token: i for token, i in model["vocab"].items() if token not in ("<|endoftext|>", "<s>")}
    splits = [(token[:k], token[k:]) for token in ids for k in range(1, len(token))]
    pairs = [(a, b) for a, b in splits if a in ids and b in ids]
    model["merges"] = [list(pair) for pair in sorted(pairs, key=lambda p: (ids["".join(p)], ids[p[0]], ids[p[1]]))]
    model["ignore_merges"] = True


def add_words(generator: random.Random, model: dict) -> None:
    """Add tokens of random characters, without a merge, at the end of the vocabulary."""
    some = sorted(model["vocab"].keys() - {"<|endoftext|>", "<s>"})
    for _ in range(generator.randint(1, 5)):
        word = "".join(generator.choices(some, k=generator.randint(2, 3)))
        model["vocab"].setdefault(word, len(model["vocab"]))


def add_token(generator: random.Random, description: dict) -> None:
    vocabulary, tokens = description["model"]["vocab"], description["added_tokens"]
    content = generator.choice(["<x>", "<y>", "  ", "ab", "the", "é", "e\u0301", "<s>", "b", "abab", "In!"])
    due = vocabulary.get(content, len(vocabulary.keys() | {token["content"] for token in tokens}))
    flag = generator.choice(["normalized", "normalized", "special", "lstrip", "rstrip", "single_word", None, None])
    tokens.append(added(due + (generator.random() < 0.1), content, **({flag: True} if flag else {})))


def change_merges(generator: random.Random, description: dict) -> None:
    model = description["model"]
    merges, at = model["merges"], generator.randrange(len(model["merges"]))
    how = generator.choice(["drop", "swap", "again", "text", "text", "every", "every", "every and words"])
    if how == "drop":
        del merges[at]
    elif how == "swap":
        merges[at], merges[0] = merges[0], merges[at]
    elif how == "again":
        merges.append(merges[at])
    elif how == "text":
        model["merges"] = [" ".join(pair) for pair in merges]
    else:
        add_words(generator, model) if how != "every" else None
        every_merge(description)


def change_vocabulary(generator: random.Random, description: dict) -> None:
    vocabulary = description["model"]["vocab"]
    token, other = generator.sample(sorted(vocabulary), 2)
    how = generator.choice(["drop", "same", "gap", "words", "words", "words"])
    if how == "drop":
        del vocabulary[token]
    elif how == "same":
        vocabulary[token] = vocabulary[other]
    elif how == "gap":
        vocabulary["ĠĠĠĠĠĠ!"] = 1000
    else:
        add_words(generator, description["model"])


ACCEPTED = [
    ("", "normalizer", [NFC, sequence("normalizers"), sequence("normalizers", NFC)]),
    ("", "pre_tokenizer", [split(pattern) for pattern in FAMILIES * 3 + SIMPLE * 2]),
    ("", "pre_tokenizer", [*(split(pattern, "Removed", True) for pattern in SIMPLE), LEVEL | {"use_regex": False}]),
    ("", "post_processor", [LEVEL, TEMPLATE, ROBERTA | {"add_prefix_space": True}]),
    ("", "post_processor", [sequence("processors", LEVEL, TEMPLATE)]),
    ("", "decoder", [LEVEL]),
    ("model", "dropout", [None, 0.0]),
    ("model", "unk_token", [None, "<s>"]),
    ("model", "continuing_subword_prefix", [""]),
    ("model", "end_of_word_suffix", [""]),
    ("model", "fuse_unk", [True]),
    ("model", "byte_fallback", [True]),
    ("model", "ignore_merges", [True, False]),
]
REFUSED = [
    ("model", "dropout", 0.1, "the model has dropout 0.1, which is not supported"),
    ("model", "end_of_word_suffix", "</w>", 'the model has end_of_word_suffix "</w>", which is not supported'),
    ("model", "continuing_subword_prefix", "##", 'the model has continuing_subword_prefix "##"'),
    ("model", "cache", 1, "the model has the key 'cache', which is not known"),
    ("model", "type", "WordPiece", 'the model has type "WordPiece"'),
    ("model", "vocab", [], "is not a BPE tokenizer.json"),
    ("model", "merges", [["a", "b", "c"]], 'the merge ["a", "b", "c"] is not of two tokens'),
    ("model", "merges", [["a", "Ġqqq"]], "is not of two tokens of the vocabulary that make a third"),
    ("", "filters", [], "it has the key 'filters', which is not known"),
    ("", "truncation", {"max_length": 8}, "it has truncation {"),
    ("", "padding", {"length": 8}, "it has padding {"),
    ("", "version", "2.0", 'it has version "2.0"'),
    ("", "added_tokens", {}, "added_tokens is {}, not a list"),
    ("", "added_tokens", [], "no end-of-text token; one of <|endoftext|>"),
    ("", "added_tokens", [1], "an added token is 1, not an object"),
    ("", "normalizer", {"type": "NFC", "form": 1}, "the normalizer has the key 'form'"),
    ("", "normalizer", 5, "normalizer 5 is not supported"),
    ("", "normalizer", sequence("normalizers", NFC, {"type": "NFKC"}), "normalizer NFKC"),
    ("", "pre_tokenizer", None, "this pre_tokenizer is not supported: []"),
    ("", "pre_tokenizer", LEVEL | {"add_prefix_space": True}, "ByteLevel has add_prefix_space true"),
    ("", "pre_tokenizer", split("a", "MergedWithNext"), 'the Split has behavior "MergedWithNext"'),
    ("", "pre_tokenizer", split("a", "Removed"), "Removed without invert"),
    ("", "pre_tokenizer", split(5), "the Split has the pattern 5"),
    ("", "decoder", {"type": "Fuse"}, 'the decoder has type "Fuse"'),
    ("", "post_processor", {"type": "BertProcessing"}, 'the post_processor has type "BertProcessing"'),
    ("", "post_processor", {"type": "TemplateProcessing", "single": [BOS]}, "which is not the text once"),
    ("", "post_processor", {"type": "TemplateProcessing", "single": [BOS, TEXT_B]}, "which is not the text once"),
    ("", "pre_tokenizer", split("a{1,99999999999}"), "which cannot be read: the repetition number is too large"),
    ("", "normalizer", {"type": "Lowercase"}, "normalizer Lowercase is not supported"),
    ("", "pre_tokenizer", {"type": "Whitespace"}, 'this pre_tokenizer is not supported: ["Whitespace"]'),
    ("", "pre_tokenizer", sequence("pretokenizers", DIGITS, LEVEL), 'is not supported: ["Digits", "ByteLevel"]'),
    ("", "pre_tokenizer", sequence("pretokenizers", DIGITS, DIGITS, LEVEL), 'not supported: ["Digits", "Digits", "B'),
    ("", "post_processor", TEMPLATE | {"single": [TEXT, TEXT]}, "which is not the text once"),
]


def change(generator: random.Random, description: dict) -> None:
    """Set one random option of the format, or change the tokens or merges at random."""
    kind = generator.choice([ACCEPTED, ACCEPTED, REFUSED, add_token, add_token, change_merges, change_vocabulary])
    if callable(kind):
        kind(generator, description)
    else:
        where, key, value, *_ = generator.choice(kind)
        value = generator.choice(value) if kind is ACCEPTED else value
        (description[where] if where else description)[key] = copy.deepcopy(value)


@pytest.fixture
def load(tmp_path):
    """Our tokenizer and the library's for a description with changes, or the sentence of ours and nothing."""
    file = tmp_path / "tokenizer.json"

    def load(description: dict, **changes) -> tuple:
        file.write_text(json.dumps(description | changes), encoding="utf-8")
        get_tokenizer.cache_clear()
        try:
            ours = get_tokenizer(file)
        except ValueError as error:
            assert str(error).startswith(str(file)) and "\n" not in str(error) and len(str(error)) < 600, str(error)
            return str(error).removeprefix(str(file)), None
        library = Library.from_file(str(file))
        library.encode_special_tokens = True  # text is text
        return ours, library

    return load


def assert_same_ids(ours, library, strings: list[str]) -> None:
    special = {i for i, token in library.get_added_tokens_decoder().items() if token.special}
    for text in strings:
        ids = library.encode(text, add_special_tokens=False).ids
        if special.isdisjoint(ids):  # with ignore_merges the library still takes a piece for one that equals it
            assert ours.encode(text) == ids, (text, ids)
        assert special.isdisjoint(ours.encode(text))
    expected = [i for text in strings for i in (*ours.encode(text), ours.eot_id)]
    assert ours.encode_documents(strings).tolist() == expected


def test_random_files_get_the_ids_of_the_library_or_a_sentence(trained, load):
    accepted, sentences = 0, set()
    for seed in range(300):
        generator = random.Random(seed)
        description = json.loads(trained)
        for _ in range(generator.randint(1, 3)):
            change(generator, description)
        ours, library = load(description)
        if library is None:
            sentences.add(ours)
        else:
            accepted += 1
            assert_same_ids(ours, library, texts(seed, 20))
    assert accepted > 75 and len(sentences) > 50


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("pattern", FAMILIES)
def test_the_known_families_are_read(description, load, pattern, words):
    """Qwen 2 has NFC and one merge for each token; Llama 3 has all possible merges, ignore_merges and longer tokens."""
    description |= {"pre_tokenizer": split(pattern), "decoder": LEVEL}
    if words:
        add_words(random.Random(1), description["model"])
        every_merge(description)
        description["post_processor"] = sequence("processors", LEVEL, TEMPLATE)
    else:
        description["normalizer"] = NFC
    description["added_tokens"] += [added(len(description["model"]["vocab"]), "<x>", special=True)]
    ours, library = load(description)
    assert_same_ids(ours, library, texts(2, 300))
    assert ours.vocab_size == library.get_vocab_size()
    assert ours.decode([ours.vocab_size - 1]) == "<x>" and ours.decode([0]) == ""


@pytest.mark.parametrize(("behavior", "invert"), [("Isolated", False), ("Isolated", True), ("Removed", True)])
@pytest.mark.parametrize("pattern", SIMPLE)
def test_what_a_split_does_not_match_is_a_piece_or_removed(description, load, pattern, behavior, invert):
    ours, library = load(description, pre_tokenizer=split(pattern, behavior, invert))
    assert_same_ids(ours, library, ["abc 1 def", *texts(3, 200)])


@pytest.mark.parametrize("pattern", FOREIGN)
def test_a_pattern_that_may_be_read_otherwise_is_refused(description, load, pattern):
    sentence, library = load(description, pre_tokenizer=split(pattern))
    assert library is None and f"the Split has the pattern {json.dumps(pattern)}, which" in sentence


@pytest.mark.slow
def test_classes_of_characters_are_those_of_the_library(description, load):
    signs = "".join(chr(c) for c in (*range(0xD800), *range(0xE000, 0x20000), *range(0xE0000, 0xE0200)))
    groups = ("Lultmo", "Mnce", "Ndlo", "Pcdseifo", "Smcko", "Zslp")
    kinds = [rf"\p{{{group[0]}{kind}}}+" for group in groups for kind in ("", *group[1:])]
    for pattern in [*FAMILIES, r"\s", r"\d", r"'(?i:[sdmt]|ll|ve|re)", *kinds]:
        ours, library = load(description, pre_tokenizer=split(pattern))
        assert ours.encode(signs) == library.encode(signs).ids, pattern


@pytest.mark.parametrize(("pattern", "run"), [(LLAMA3_SPLIT, " "), (QWEN2_SPLIT, "\t \n")])
def test_long_white_space_is_cut_out_of_the_known_families(description, load, monkeypatch, pattern, run):
    """Both have the same rule for white space, so one run for each is enough."""
    ours, library = load(description, pre_tokenizer=split(pattern))
    text = "x!" + run * (1_050_000 // len(run)) + "  y"
    assert ours.encode(text) == library.encode(text).ids
    monkeypatch.setattr("mamba2.tokenizer.BLOCK", 10)
    generator = random.Random(4)
    for _ in range(1000):
        signs = generator.choices("  \n\t\r\x85\x1cb!1é", (9, 9, 3, 3, 3, 3, 1, *[generator.random()] * 4), k=100)
        assert ours.encode("".join(signs)) == library.encode("".join(signs)).ids, signs


def test_a_text_that_cannot_be_split_is_named(description, load):
    ours, _ = load(description, pre_tokenizer=split("[0-9]"))
    text = "some" + "x" * 1_500_000
    for encode, argument in ((ours.encode, text), (ours.encode_documents, ["1", text])):
        with pytest.raises(ValueError, match="cannot split a text of 1500004 characters, which begins with 'somexxx"):
            encode(argument)


def test_what_cannot_be_merged_is_named(description, load):
    model = description["model"]
    reversed_merges = {"merges": model["merges"][::-1]}
    assert "is not in the order of the ids" in load(description, model=model | reversed_merges)[0]
    for token in ("!", "é"):  # 0x21 and 0xE9
        del model["vocab"][token]
    assert "the vocabulary lacks the bytes 0x21, 0xE9" in load(description, model=model | {"merges": []})[0]


def test_a_token_without_a_merge_is_of_no_text_unless_merges_are_ignored(description, load):
    model = description["model"]
    model["vocab"]["qzq"] = number = len(model["vocab"])
    ours, library = load(description)
    assert number not in ours.encode("qzq") and ours.decode([number]) == "qzq"
    assert_same_ids(ours, library, ["qzq", " qzq"])
    model["ignore_merges"] = True
    ours, library = load(description)
    assert ours.encode("qzq") == [number] and number not in ours.encode("qzqzq")
    assert_same_ids(ours, library, ["qzq", "qzqzq", "qzq qzq"])
    model["vocab"]["zq"] = number + 1  # tiktoken would make it in any word
    assert "in its merges the one that makes b'qzq' is missing" in load(description)[0]


def test_of_added_tokens_the_raw_come_first_and_the_longest_counts(description, load):
    vocabulary = description["model"]["vocab"]
    number = len(vocabulary)
    for content, flags in (("ab", {}), ("xa", {"normalized": True}), ("abc", {}), ("e\u0301!", {"normalized": True})):
        number = vocabulary.get(content, number)
        description["added_tokens"].append(added(number, content, **flags))
        number = max(number, len(vocabulary) - 1) + 1
    ours, library = load(description, normalizer=NFC)
    assert_same_ids(ours, library, ["xabc", "xab", "xa ab", "é! e\u0301!", "ab\u0301", "xaxaab"])


@pytest.mark.parametrize(("where", "key", "value", "sentence"), REFUSED)
def test_what_is_not_known_is_refused_by_name(description, load, where, key, value, sentence):
    (description[where] if where else description)[key] = value
    assert sentence in load(description)[0]


@pytest.mark.parametrize("content", ["<|end", "text", ">>", "<s>!", "x<s>", "|>x", "<"])
def test_an_added_token_is_not_found_inside_a_special_one(description, load, content):
    """The library skips a special token as a whole, so a token that could match from inside it is refused."""
    vocabulary = description["model"]["vocab"]
    description["added_tokens"].append(added(vocabulary.setdefault(content, len(vocabulary)), content))
    ours, library = load(description)
    if content in ("<s>!", "x<s>"):
        assert_same_ids(ours, library, ["x<s>!", "<s>", "<s><s>!x<s>", f"<|endoftext|>{content}>>x"])
    else:
        assert f"the added token {content!r} can begin inside the special token" in ours


def test_an_end_of_text_that_text_could_hold_is_refused(description, load):
    description["added_tokens"][0]["special"] = False
    assert "the end-of-text token '<|endoftext|>' is not special, so that text could hold it" in load(description)[0]


@pytest.mark.parametrize("content", ["[" * 100_000, "", "[]", '{"model": []}', "{}", "\xff"])
def test_what_is_no_tokenizer_json_is_one_sentence(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"is not a BPE tokenizer\.json"):
        find_tokenizer(tmp_path)


def test_a_model_folder_carries_its_tokenizer(description, load, tmp_path):
    by_file, _ = load(description)
    for name, tokenizer in (("named", get_tokenizer("gpt2")), ("copied", by_file)):
        (tmp_path / name).mkdir()
        save_tokenizer(tokenizer, tmp_path / name)
        assert load_tokenizer(tmp_path / name).identity == tokenizer.identity
    empty = tmp_path / "empty"
    empty.mkdir()
    assert find_tokenizer(empty) is None
    with pytest.raises(ValueError, match="carries no tokenizer"):
        load_tokenizer(empty)
    for record in ("", "[]", '{"name": ["gpt2"]}', '{"name": "gpt3"}'):
        (empty / "mamba2_tokenizer.json").write_text(record)
        with pytest.raises(ValueError, match="names no tokenizer; its name must be one of bytes"):
            find_tokenizer(empty)
    with pytest.raises(FileNotFoundError, match=r"no model folder at .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
