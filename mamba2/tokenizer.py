"""Text to token ids and back: `bytes`, `gpt2`, `gpt-neox-20b`, or a byte-level BPE `tokenizer.json` by path.

tiktoken does the merging; the ids are those of the `tokenizers` library for the same vocabulary. GPT-NeoX needs three
things beyond its ranks: NFC normalisation, runs of 2 to 24 spaces that are tokens of their own and are taken out before
the merging, longest first, and `<|endoftext|>` = 0. The runs are taken out by the rule that splits the text
(`SPACES_SPLIT`), at tiktoken's speed.

Text is text: `encode` never yields the end-of-text id, whatever a document says; append `eot_id` yourself.
"""

import hashlib
import itertools
import json
import lzma
import os
import re
import shutil
import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken

BUILTIN = ("bytes", "gpt2", "gpt-neox-20b")
RECORD = "mamba2_tokenizer.json"
VOCABULARIES = Path(__file__).parent / "vocab"
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")

# GPT-2's rule for what may merge: contractions, words, numbers, other signs, white space (Radford et al. 2019).
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# The same rule after runs of 2 to MOST spaces are taken out: a run is tried first wherever one begins, and white space
# stops where a run begins. No other alternative can enter a run, for it holds one space at most, in front.
BLANK = r"(?:[^\S ]| (?! ))+"
SPACES_SPLIT = (
    rf" {{2,MOST}}|'(?:[sdmt]|ll|ve|re)| ?\p{{L}}++| ?\p{{N}}++| ?[^\s\p{{L}}\p{{N}}]++|{BLANK}(?!\S)|{BLANK}"
)

# Stands between documents that are encoded together; tiktoken gives it the id of end of text.
SEPARATOR = "<|end of document|>"


class Tokenizer:
    """A vocabulary with its rules; see `get_tokenizer`.

    Attributes:
        name: of the built-in, or the path that it was read from.
        identity: equal for tokenizers that give equal ids: the built-in's name, or the file's sha256.
        vocab_size: one more than the largest id. A model may have more rows (GPT-NeoX: 50 277 ids, 50 280 rows).
        eot_id: the id that ends a document.
        tokens: the bytes of each id; extra: the id of each token that is not the result of merging.
        nfc: whether text is normalised to NFC first.
    """

    def __init__(
        self,
        name: str,
        identity: str,
        ranks: dict[bytes, int],
        eot_id: int,
        extra: dict[bytes, int] | None = None,
        pattern: str = GPT2_SPLIT,
        nfc: bool = False,
        file: Path | None = None,
    ):
        """`ranks`: id of each token that merging can yield, in the order of merging. `extra`: id of each token that is
        taken out of the text before, or that stands in no text at all (end of text)."""
        extra = extra or {}
        self.name, self.identity, self.eot_id, self.file = name, identity, eot_id, file
        self.nfc = nfc
        # Some bytes have two ids: a run of spaces can be merged, which no text comes to, but a model may draw it.
        self.extra = extra
        self.tokens = {i: token for some in (ranks, extra) for token, i in some.items()}
        self.vocab_size = max(*self.tokens, eot_id) + 1
        atoms = sorted((t.decode() for t, i in extra.items() if i != eot_id), key=len, reverse=True)
        runs = [atom for atom in atoms if set(atom) == {" "}]
        others = [atom for atom in atoms if set(atom) != {" "}]
        by_rule = runs and sorted(map(len, runs)) == list(range(2, len(runs) + 2)) and pattern == GPT2_SPLIT
        if by_rule and not any(" " in atom for atom in others):
            ranks = ranks | {run.encode(): extra[run.encode()] for run in runs}
            pattern, atoms = SPACES_SPLIT.replace("MOST", str(len(runs) + 1)), others
        self._encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={SEPARATOR: eot_id}
        )
        self._atoms = re.compile("|".join(map(re.escape, atoms))) if atoms else None
        self._atom_ids = {token.decode(): i for token, i in extra.items()}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added. A lone surrogate, which UTF-8 cannot hold, counts as U+FFFD."""
        text = self._normalise(text)
        if self._atoms is None:
            return self._encoding.encode_ordinary(text)
        ids: list[int] = []
        end = 0
        for match in self._atoms.finditer(text):
            if match.start() > end:
                ids += self._encoding.encode_ordinary(text[end : match.start()])
            ids.append(self._atom_ids[match.group()])
            end = match.end()
        if end < len(text):
            ids += self._encoding.encode_ordinary(text[end:])
        return ids

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """Ids of `texts` one after the other, each followed by `eot_id`: (tokens,) uint32, the ids of `encode`.

        One call into tiktoken for all of them, in which other threads can run.
        """
        joined = "".join(self._normalise(text) + SEPARATOR for text in texts)
        plain = joined.count(SEPARATOR) == len(texts) and not (self._atoms and self._atoms.search(joined))
        if plain:
            try:
                return self._encoding.encode_to_numpy(joined, allowed_special={SEPARATOR}, disallowed_special=())
            except UnicodeEncodeError:
                pass  # a lone surrogate, which `encode` replaces
        return np.array([i for text in texts for i in (*self.encode(text), self.eot_id)], dtype=np.uint32)

    def _normalise(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self.nfc and not text.isascii() else text

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The bytes behind `ids`; end of text is the empty string. Raises ValueError naming an id that is unknown."""
        try:
            return b"".join(b"" if i == self.eot_id else self.tokens[i] for i in map(int, ids))
        except KeyError as error:
            raise ValueError(f"id {error.args[0]} is not in the vocabulary of {self.name}") from None

    def decode(self, ids: list[int]) -> str:
        """The text behind `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and 256 for end of text."""

    def __init__(self):
        self.name = self.identity = "bytes"
        self.eot_id, self.vocab_size, self.file = 256, 257, None
        self.extra, self.nfc, self.tokens = {}, False, {i: bytes([i]) for i in range(256)}

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`; a lone surrogate counts as U+FFFD, as in the other tokenizers."""
        return list(self._utf8(text))

    @staticmethod
    def _utf8(text: str) -> bytes:
        try:
            return text.encode()
        except UnicodeEncodeError:
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """Ids of `texts` one after the other, each followed by 256: (tokens,) uint32."""
        joined = b"".join(self._utf8(text) + b"\xff" for text in texts)  # no UTF-8 holds the byte 255
        ids = np.frombuffer(joined, dtype=np.uint8).astype(np.uint32)
        ids[ids == 0xFF] = self.eot_id
        return ids


@lru_cache
def get_tokenizer(name_or_path: str | os.PathLike) -> Tokenizer:
    """A built-in tokenizer by name, or one from a `tokenizer.json` (the file, or the folder that holds it).

    Raises ValueError listing the names when it is neither, or saying what in the file is not supported.
    """
    if name_or_path == "bytes":
        return ByteTokenizer()
    if name_or_path == "gpt2":
        ranks = {token: i for i, token in enumerate(_shipped("gpt2"))}
        return Tokenizer("gpt2", "gpt2", ranks, eot_id=50256)
    if name_or_path == "gpt-neox-20b":
        # 0 and 1 are <|endoftext|> and <|padding|>, the last 23 ids the runs of spaces, longest first
        ranks = {token: i for i, token in enumerate(_shipped("gpt-neox-20b"), start=2)}
        runs = {b" " * (24 - k): 50254 + k for k in range(23)}
        return Tokenizer("gpt-neox-20b", "gpt-neox-20b", ranks, 0, {b"<|padding|>": 1, **runs}, nfc=True)
    path = Path(name_or_path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no tokenizer {str(name_or_path)!r}: choose {', '.join(BUILTIN)}, or a tokenizer.json")
    return _from_file(file)


def save_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike) -> None:
    """Leave in a model's folder all that `load_tokenizer` needs: the name of a built-in, or the file itself."""
    folder = Path(folder)
    if tokenizer.file is not None:
        shutil.copyfile(tokenizer.file, folder / "tokenizer.json")
    else:
        (folder / RECORD).write_text(json.dumps({"name": tokenizer.name}) + "\n", encoding="utf-8")


def find_tokenizer(folder: str | os.PathLike) -> Tokenizer | None:
    """The tokenizer that a model's folder carries, None when it carries none.

    Raises FileNotFoundError when there is no such folder, ValueError when what it carries cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder at {folder}")
    if (folder / RECORD).is_file():
        return get_tokenizer(json.loads((folder / RECORD).read_text(encoding="utf-8"))["name"])
    return get_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer that a model's folder carries. Raises ValueError when it carries none; see `find_tokenizer`."""
    tokenizer = find_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(f"{folder} carries no tokenizer: neither {RECORD} nor tokenizer.json lies there")
    return tokenizer


def _shipped(name: str) -> list[bytes]:
    """Tokens in order of rank from vocab/NAME.xz: each two bytes of length, low first, then its bytes."""
    data = lzma.decompress((VOCABULARIES / f"{name}.xz").read_bytes())
    tokens, at = [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 2], "little")
        tokens.append(data[at + 2 : at + 2 + length])
        at += 2 + length
    return tokens


def byte_characters() -> dict[str, int]:
    """GPT-2's way to write a byte as one visible character: the byte behind each character."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


def _from_file(file: Path) -> Tokenizer:
    try:
        content = file.read_bytes()
        description = json.loads(content)
        model, normalizer = description["model"], description.get("normalizer")
        vocabulary, merges = model["vocab"], model["merges"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a BPE tokenizer.json: {error!r}") from error
    if normalizer is not None and normalizer["type"] != "NFC":
        raise ValueError(f"{file}: normalizer {normalizer['type']} is not supported; none or NFC is")
    pattern = _split_pattern(file, description.get("pre_tokenizer") or {})

    added = {token["content"]: token["id"] for token in description.get("added_tokens", [])}
    eot_id = next((added[name] for name in END_OF_TEXT if name in added), None)
    if eot_id is None:
        raise ValueError(f"{file} has no end-of-text token; one of {', '.join(END_OF_TEXT)} must be an added token")
    for token in description.get("added_tokens", []):
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise ValueError(f"{file}: added token {token['content']!r} strips its neighbours, which is not supported")
    special = {t["content"] for t in description.get("added_tokens", []) if t["special"]}
    characters = byte_characters()
    try:
        ranks = {bytes(characters[c] for c in t): i for t, i in vocabulary.items() if t not in added}
    except KeyError as error:
        raise ValueError(f"{file} is not byte-level: its vocabulary holds the character {error.args[0]!r}") from None
    # tiktoken merges in the order of the ids, the tokenizers library in the order of the merges: they must be the same.
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    merged = [vocabulary.get("".join(pair), -1) for pair in pairs]
    if any(a >= b for a, b in itertools.pairwise(merged)):
        raise ValueError(f"{file}: its merges are not in the order of the ids, which is not supported")
    # Special tokens never come out of text; what stays is matched in it before the merging.
    extra = {content.encode(): i for content, i in added.items() if content not in special}
    identity = "sha256:" + hashlib.sha256(content).hexdigest()
    return Tokenizer(str(file), identity, ranks, eot_id, extra, pattern, normalizer is not None, file)


def _split_pattern(file: Path, rule: dict) -> str:
    """The regular expression of a pre_tokenizer: ByteLevel alone, or a Split by a regex and then ByteLevel."""
    steps = rule.get("pretokenizers", [rule])
    level = steps[-1]
    if level.get("type") == "ByteLevel" and not level.get("add_prefix_space"):
        if len(steps) == 1 and level.get("use_regex", True):
            return GPT2_SPLIT
        split = steps[0]
        by_regex = len(steps) == 2 and split["type"] == "Split" and "Regex" in split["pattern"]
        if by_regex and split["behavior"] == "Isolated" and not split["invert"] and not level.get("use_regex", True):
            return split["pattern"]["Regex"]
    raise ValueError(
        f"{file}: this pre_tokenizer is not supported; ByteLevel without a prefix space is, alone or after one Split "
        "by a Regex"
    )
