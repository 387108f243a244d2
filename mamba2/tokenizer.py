"""Text to token ids and back: `bytes`, `gpt2`, `gpt-neox-20b`, or a byte-level BPE `tokenizer.json` by path.

tiktoken does the merging; the ids are those of the `tokenizers` library for the same vocabulary. GPT-NeoX needs three
things beyond its ranks: NFC normalisation, runs of 2 to 24 spaces that are tokens of their own and are taken out before
the merging, longest first, and `<|endoftext|>` = 0. The runs are taken out by the rule that splits the text
(`SPACES_SPLIT`), at tiktoken's speed. NFC is that of Python's Unicode, and the library's is older: where text has
several combining marks on one letter, out of order and one of them younger than 2017, the ids may not be the same.

Text is text: `encode` never yields the end-of-text id, whatever a document says; append `eot_id` yourself.
"""

import json
import lzma
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from mamba2.tokenizer_reader import GPT2_SPLIT, LLAMA3_SPLIT, QWEN2_SPLIT, read_tokenizer_json

BUILTIN = ("bytes", "gpt2", "gpt-neox-20b")
RECORD = "mamba2_tokenizer.json"
VOCABULARIES = Path(__file__).parent / "vocab"

# GPT-2's rule after runs of 2 to MOST spaces are taken out: a run is tried first wherever one begins, and white space
# stops where a run begins. No other alternative can enter a run, for it holds one space at most, in front.
BLANK = r"(?:[^\S ]| (?! ))+"
SPACES_SPLIT = (
    rf" {{2,MOST}}|'(?:[sdmt]|ll|ve|re)| ?\p{{L}}++| ?\p{{N}}++| ?[^\s\p{{L}}\p{{N}}]++|{BLANK}(?!\S)|{BLANK}"
)

# tiktoken's engine for regular expressions stops at 500 000 to 1 000 000 signs of white space in one piece. Text that
# is white from one multiple of BLOCK to the next is searched for STRETCHES, each one piece, save perhaps its last sign.
BLOCK = 100_000
WHITE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s for tiktoken; Python's holds four more
STRETCHES = {
    GPT2_SPLIT: rf"[{WHITE}]++",
    SPACES_SPLIT: rf" {{2,MOST}}|(?:(?! )[{WHITE}]| (?! ))++",
    # up to the last newline it is another piece, which is no trouble
    QWEN2_SPLIT: rf"(?:(?![\r\n])[{WHITE}])++",
    LLAMA3_SPLIT: rf"(?:(?![\r\n])[{WHITE}])++",
}

# Stands between documents that are encoded together; tiktoken gives it the id of end of text.
SEPARATOR = "<|end of document|>"


class Tokenizer:
    """A vocabulary with its rules; see `get_tokenizer`.

    Attributes:
        name: of the built-in, or the path that it was read from.
        identity: equal for tokenizers that give equal ids: the built-in's name, or the file's sha256.
        vocab_size: one more than the largest id. A model may have more rows (GPT-NeoX: 50 277 ids, 50 280 rows).
        eot_id: the id that ends a document.
        tokens: the bytes of each id; extra: the id of each token that is taken out of text before the merging.
        nfc: whether text is normalised to NFC first.
    """

    def __init__(
        self,
        name: str,
        identity: str,
        ranks: dict[bytes, int],
        eot_id: int,
        extra: dict[bytes, int] | None = None,
        raw: Collection[bytes] = (),
        unused: dict[bytes, int] | None = None,
        pattern: str = GPT2_SPLIT,
        nfc: bool = False,
        file: Path | None = None,
    ):
        """`ranks`: id of each token that merging can yield, in the order of merging. `extra`: id of each token that is
        taken out of the text before; those in `raw` before it is normalised. `unused`: id of each token that no text
        comes to, such as the special ones."""
        extra = extra or {}
        self.name, self.identity, self.eot_id, self.file = name, identity, eot_id, file
        self.nfc = nfc
        # Some bytes have two ids: a run of spaces can be merged, which no text comes to, but a model may draw it.
        self.extra = extra
        self.tokens = {i: token for some in (unused or {}, ranks, extra) for token, i in some.items()}
        self.vocab_size = max(*self.tokens, eot_id) + 1
        raw_ids = {token.decode(): i for token, i in extra.items() if token in raw}
        # of two tokens that are the same when normalised the first counts
        atom_ids = {self._normalise(token.decode()): extra[token] for token in reversed(extra) if token not in raw}
        runs = {" " * n: extra[b" " * n] for n in range(2, len(extra) + 2) if b" " * n in extra}
        rule = pattern
        in_a_row = runs and len(max(runs)) == len(runs) + 1
        if in_a_row and pattern == GPT2_SPLIT and not any(" " in atom for atom in (raw_ids | atom_ids).keys() - runs):
            ranks = ranks | {run.encode(): i for run, i in runs.items()}
            rule = SPACES_SPLIT
            raw_ids, atom_ids = ({a: i for a, i in ids.items() if a not in runs} for ids in (raw_ids, atom_ids))
        most = str(len(runs) + 1)
        try:
            self._encoding = tiktoken.Encoding(
                name, pat_str=rule.replace("MOST", most), mergeable_ranks=ranks, special_tokens={SEPARATOR: eot_id}
            )
        except ValueError as error:
            raise ValueError(f"{name}: the regular expression {pattern!r} cannot be read: {error}") from None
        self._stretch = re.compile(STRETCHES[rule].replace("MOST", most)) if rule in STRETCHES else None
        self._raw_ids, self._raw = raw_ids, _any_of(raw_ids)
        self._atom_ids, self._atoms = atom_ids, _any_of(atom_ids)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added. A lone surrogate, which UTF-8 cannot hold, counts as U+FFFD.

        Raises ValueError where tiktoken cannot split the text, which only the pattern of a file can come to.
        """
        ids: list[int] = []
        # re.split gives the text between two tokens at even places, and a token at odd ones
        for k, part in enumerate(self._raw.split(text) if self._raw else [text]):
            if k % 2:
                ids.append(self._raw_ids[part])
                continue
            part = self._normalise(part)
            for m, piece in enumerate(self._atoms.split(part) if self._atoms else [part]):
                ids += [self._atom_ids[piece]] if m % 2 else self._merge(piece)
        return ids

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """Ids of `texts` one after the other, each followed by `eot_id`: (tokens,) uint32, the ids of `encode`.

        One call into tiktoken for all of them, in which other threads can run. Raises ValueError as `encode` does.
        """
        joined = "".join(self._normalise(text) + SEPARATOR for text in texts)
        plain = joined.count(SEPARATOR) == len(texts) and not (self._atoms and self._atoms.search(joined))
        if plain and not _holds_white_block(joined) and not (self._raw and any(map(self._raw.search, texts))):
            try:
                return self._call(
                    self._encoding.encode_to_numpy, joined, allowed_special={SEPARATOR}, disallowed_special=()
                )
            except ValueError:
                pass  # a lone surrogate, which `encode` replaces, or a text that it refuses by name
        return np.array([i for text in texts for i in (*self.encode(text), self.eot_id)], dtype=np.uint32)

    def _merge(self, text: str) -> list[int]:
        """Ids of text that holds no token of `extra`, a long stretch of white space on its own."""
        if self._stretch is None or not _holds_white_block(text):
            return self._call(self._encoding.encode_ordinary, text)
        start, ids = 0, []
        for match in self._stretch.finditer(text):
            after = text[match.end() : match.end() + 1]
            # the last sign goes with what follows, unless that is white space or nothing
            end = match.end() - bool(re.match(rf"[^{WHITE}]", after))
            if end - match.start() < BLOCK or after in {"\r", "\n"}:
                continue
            ids += self._call(self._encoding.encode_ordinary, text[start : match.start()])
            ids += self._encoding._encode_single_piece(text[match.start() : end])
            start = end
        return ids + self._call(self._encoding.encode_ordinary, text[start:])

    def _call(self, encode: Callable, text: str, **arguments) -> Any:
        """tiktoken panics where its engine for regular expressions gives up; the exception has no public name."""
        try:
            return encode(text, **arguments)
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(
                f"{self.name} cannot split a text of {len(text)} characters, which begins with {text[:40]!r}: a piece "
                "of it is too long for its regular expression"
            ) from None

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
    return Tokenizer(**read_tokenizer_json(file))


def _any_of(atoms: Iterable[str]) -> re.Pattern | None:
    """A rule that finds the longest of `atoms`, None when there are none."""
    found = sorted(atoms, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, found))})") if found else None


def _holds_white_block(text: str) -> bool:
    """Whether text is white space from one multiple of BLOCK to the next; a look at the first sign tells most often."""
    return any(text[i].isspace() and text[i : i + BLOCK].isspace() for i in range(0, len(text) - BLOCK + 1, BLOCK))


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
        try:
            name = json.loads((folder / RECORD).read_bytes())["name"]
        except (ValueError, KeyError, TypeError, RecursionError):
            name = None
        if name not in BUILTIN:
            raise ValueError(f"{folder / RECORD} names no tokenizer; its name must be one of {', '.join(BUILTIN)}")
        return get_tokenizer(name)
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
