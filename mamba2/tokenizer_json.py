"""Write a tokenizer for AutoTokenizer of transformers: tokenizer.json and tokenizer_config.json."""

import json
import shutil
from pathlib import Path

from mamba2.tokenizer import Tokenizer
from mamba2.tokenizer_reader import byte_characters, merge_bytes

END_OF_TEXT = "<|endoftext|>"


def write_tokenizer_json(tokenizer: Tokenizer, folder: Path) -> None:
    """Write both files. AutoTokenizer then gives text the ids that `tokenizer` gives, except that it finds
    `<|endoftext|>` in text.

    A tokenizer that was read from a file is copied, and AutoTokenizer adds the special tokens that the file puts around
    a text.
    """
    file, end_of_text = folder / "tokenizer.json", END_OF_TEXT
    if tokenizer.file is None:
        file.write_text(json.dumps(describe(tokenizer), ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        if tokenizer.file.resolve() != file.resolve():
            shutil.copyfile(tokenizer.file, file)
        added = json.loads(file.read_text(encoding="utf-8"))["added_tokens"]
        end_of_text = next(token["content"] for token in added if token["id"] == tokenizer.eot_id)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), end_of_text),
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def describe(tokenizer: Tokenizer) -> dict:
    """The contents of tokenizer.json for a built-in tokenizer."""
    character = {byte: c for c, byte in byte_characters().items()}

    def visible(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    extra, not_merged = tokenizer.extra, set(tokenizer.extra.values())
    ranks = {token: i for i, token in tokenizer.tokens.items() if i not in not_merged}
    vocabulary = {visible(token): i for token, i in ranks.items()} | {t.decode(): i for t, i in extra.items()}
    vocabulary[END_OF_TEXT] = tokenizer.eot_id
    added = [_added(tokenizer.eot_id, END_OF_TEXT, special=True)]
    for token, i in extra.items():
        if i != tokenizer.eot_id:  # tokens of spaces are ordinary text, the others are special
            added.append(_added(i, token.decode(), special=not token.isspace()))
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
        "pre_tokenizer": {**level, "use_regex": tokenizer.name != "bytes"},
        "post_processor": None,
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])),
            "merges": [[visible(a), visible(b)] for a, b in find_merges(ranks)],
        },
    }


def find_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two tokens that each longer token is merged from, in order of rank."""
    longer = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    return [(a, b) for a, b in (merge_bytes(token, ranks) for token in longer)]


def _added(i: int, content: str, special: bool) -> dict:
    settings = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"id": i, "content": content, **settings, "special": special}
