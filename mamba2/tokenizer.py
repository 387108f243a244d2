"""Text to token ids and back: `bytes`, `gpt2`, `gpt-neox-20b`, or a byte-level BPE `tokenizer.json` by path.

tiktoken does the merging; the ids are those of the `tokenizers` library for the same vocabulary. GPT-NeoX needs three
things beyond its ranks: NFC normalisation, runs of 2 to 24 spaces that are tokens of their own and are taken out before
the merging, longest first, and `<|endoftext|>` = 0. The regular expression that splits the text takes out the runs
(`SPACES_SPLIT`), which is fast. NFC follows Python's version of Unicode, which is newer than the library's. The ids can
differ where a letter has several combining marks in the wrong order, one of which was added to Unicode after 2017.

`encode` never yields the end-of-text id, even if a document contains the name of that token. Append `eot_id` yourself.
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

# GPT-2's pattern, with runs of 2 to MOST spaces taken out first: a run matches before anything else, and other white
# space ends where a run begins. No other alternative reaches into a run, because it has at most one space, in front.
BLANK = r"(?:[^\S ]| (?! ))+"
SPACES_SPLIT = (
    rf" {{2,MOST}}|'(?:[sdmt]|ll|ve|re)| ?\p{{L}}++| ?\p{{N}}++| ?[^\s\p{{L}}\p{{N}}]++|{BLANK}(?!\S)|{BLANK}"
)

# tiktoken's regular expressions fail on a piece of 500 000 to 1 000 000 characters of white space. If all characters
# from one multiple of BLOCK to the next are white space, the text is searched for STRETCHES. Each of these patterns
# matches one piece of the split, perhaps without its last character.
BLOCK = 100_000
WHITE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s in tiktoken; Python's has four more
STRETCHES = {
    GPT2_SPLIT: rf"[{WHITE}]++",
    SPACES_SPLIT: rf" {{2,MOST}}|(?:(?! )[{WHITE}]| (?! ))++",
    # the white space up to the last newline is a piece that tiktoken can match at any length
    QWEN2_SPLIT: rf"(?:(?![\r\n])[{WHITE}])++",
    LLAMA3_SPLIT: rf"(?:(?![\r\n])[{WHITE}])++",
}

# Follows each document when several are encoded in one call; tiktoken gives it the end-of-text id.
SEPARATOR = "<|end of document|>"


class Tokenizer:
    """A vocabulary with its rules; see `get_tokenizer`.

    Attributes:
        name: of the built-in, or the path that it was read from.
        identity: equal only for tokenizers that give equal ids: the built-in's name, or the file's sha256.
        vocab_size: the largest id plus one. A model may have more rows (GPT-NeoX: 50 277 ids, 50 280 rows).
        eot_id: the id that ends a document.
        tokens: the bytes of each id.
        extra: the id of each token that is taken out of the text before the merging.
        nfc: whether text is normalised to NFC first.
        pattern: the regular expression whose matches are the pieces in which merging happens.
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
        taken out of the text before the merging; those in `raw` are taken out before it is normalised. `unused`: id of
        each token that `encode` never yields, such as the special ones. `file`: the tokenizer.json that all this was
        read from."""
        extra = extra or {}
        self.name, self.identity, self.eot_id, self.file = name, identity, eot_id, file
        self.nfc, self.extra, self.pattern = nfc, extra, pattern
        # `encode` yields one id for the same bytes, but a run of spaces has a second id, which a model can sample.
        self.tokens = {i: token for some in (unused or {}, ranks, extra) for token, i in some.items()}
        self.vocab_size = max(*self.tokens, eot_id) + 1
        raw_ids = {token.decode(): i for token, i in extra.items() if token in raw}
        # if two tokens are equal after normalisation, the first one counts
        atom_ids = {self._normalise(token.decode()): extra[token] for token in reversed(extra) if token not in raw}
        runs = {" " * n: extra[b" " * n] for n in range(2, len(extra) + 2) if b" " * n in extra}
        most, rule = str(len(runs) + 1), pattern
        without_gap = runs and len(max(runs)) == len(runs) + 1  # runs of 2, 3, ..., MOST spaces
        others = (raw_ids | atom_ids).keys() - runs
        if without_gap and pattern == GPT2_SPLIT and not any(" " in atom for atom in others):
            ranks = ranks | {run.encode(): i for run, i in runs.items()}
            rule = SPACES_SPLIT
            raw_ids, atom_ids = ({a: i for a, i in ids.items() if a not in runs} for ids in (raw_ids, atom_ids))
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
        """Ids of `text`, without end-of-text. A lone surrogate, which UTF-8 cannot hold, counts as U+FFFD.

        Raises ValueError if tiktoken cannot split the text; this can happen only with the pattern of a file.
        """
        ids: list[int] = []
        # re.split returns tokens at odd places, and the text between them at even places
        for k, part in enumerate(self._raw.split(text) if self._raw else [text]):
            if k % 2:
                ids.append(self._raw_ids[part])
                continue
            part = self._normalise(part)
            for m, piece in enumerate(self._atoms.split(part) if self._atoms else [part]):
                ids += [self._atom_ids[piece]] if m % 2 else self._merge(piece)
        return ids

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """The ids that `encode` gives, for all `texts` in order, each text followed by `eot_id`: (tokens,) uint32.

        tiktoken encodes all in one call, during which other threads can run. Raises ValueError as `encode` does.
        """
        joined = "".join(self._normalise(text) + SEPARATOR for text in texts)
        plain = joined.count(SEPARATOR) == len(texts) and not (self._atoms and self._atoms.search(joined))
        if plain and not _holds_white_block(joined) and not (self._raw and any(map(self._raw.search, texts))):
            try:
                return self._call(
                    self._encoding.encode_to_numpy, joined, allowed_special={SEPARATOR}, disallowed_special=()
                )
            except ValueError:
                pass  # `encode` replaces a lone surrogate, and names a text that cannot be split
        return np.array([i for text in texts for i in (*self.encode(text), self.eot_id)], dtype=np.uint32)

    def _merge(self, text: str) -> list[int]:
        """Ids of a text without tokens of `extra`. A long stretch of white space is encoded on its own."""
        if self._stretch is None or not _holds_white_block(text):
            return self._call(self._encoding.encode_ordinary, text)
        start, ids = 0, []
        for match in self._stretch.finditer(text):
            after = text[match.end() : match.end() + 1]
            if match.end() - match.start() < BLOCK or after in {"\r", "\n"}:
                continue
            # the last character belongs to the next piece, unless white space or the end of the text follows
            end = match.end() - bool(re.match(rf"[^{WHITE}]", after))
            ids += self._call(self._encoding.encode_ordinary, text[start : match.start()])
            ids += self._encoding._encode_single_piece(text[match.start() : end])
            start = end
        return ids + self._call(self._encoding.encode_ordinary, text[start:])

    def _call(self, encode: Callable, text: str, **arguments) -> Any:
        """tiktoken panics if its regular expression fails; make it a ValueError. The panic has no public type."""
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
        """The bytes of `ids`; those of end-of-text are empty. Raises ValueError naming an id that is unknown."""
        try:
            return b"".join(b"" if i == self.eot_id else self.tokens[i] for i in map(int, ids))
        except KeyError as error:
            raise ValueError(f"id {error.args[0]} is not in the vocabulary of {self.name}") from None

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


@lru_cache
def get_tokenizer(name_or_path: str | os.PathLike) -> Tokenizer:
    """A built-in tokenizer by name, or one from a `tokenizer.json` (the file, or the folder that holds it).

    Raises ValueError listing the names if it is neither, or saying what in the file is not supported.
    """
    if name_or_path == "bytes":
        # nothing merges, so the ids do not depend on where the pieces end
        ranks = {bytes([byte]): byte for byte in range(256)}
        return Tokenizer("bytes", "bytes", ranks, eot_id=256, pattern=r"[\s\S]{1,99}")
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
    """A pattern that finds the longest of `atoms`, None if there are none."""
    found = sorted(atoms, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, found))})") if found else None


def _holds_white_block(text: str) -> bool:
    """Whether all characters from one multiple of BLOCK to the next are white space; most often the first is not."""
    return any(text[i].isspace() and text[i : i + BLOCK].isspace() for i in range(0, len(text) - BLOCK + 1, BLOCK))


def save_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike) -> None:
    """Write to a model's folder what `load_tokenizer` needs: the name of a built-in, or the file itself."""
    folder = Path(folder)
    if tokenizer.file is not None:
        shutil.copyfile(tokenizer.file, folder / "tokenizer.json")
    else:
        (folder / RECORD).write_text(json.dumps({"name": tokenizer.name}) + "\n", encoding="utf-8")


def find_tokenizer(folder: str | os.PathLike) -> Tokenizer | None:
    """The tokenizer in a model's folder, None if there is none.

    Raises FileNotFoundError if there is no such folder, ValueError if the tokenizer cannot be read.
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
    """The tokenizer in a model's folder. Raises ValueError if there is none, and what `find_tokenizer` raises."""
    tokenizer = find_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(f"{folder} carries no tokenizer: neither {RECORD} nor tokenizer.json lies there")
    return tokenizer


def _shipped(name: str) -> list[bytes]:
    """Tokens in order of rank from vocab/NAME.xz: for each its length as little-endian uint16, then its bytes."""
    tokens = []
    with lzma.open(VOCABULARIES / f"{name}.xz") as file:
        while length := file.read(2):
            tokens.append(file.read(int.from_bytes(length, "little")))
    return tokens
