"""The tokens of what --dataset-path names: read as they are, or prepared once into the cache."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from mamba2.data.foreign import find_files, open_foreign
from mamba2.data.prepare import Plan, prepare
from mamba2.data.sources import fingerprint, open_source
from mamba2.data.splits import VALIDATION_SPLITS, NoSplit
from mamba2.data.synthetic import is_synthetic, synthetic_tokens
from mamba2.data.tokens import SIDECAR, Tokens, open_tokens
from mamba2.tokenizer import Tokenizer


def load_tokens(source: str | os.PathLike, split: str, tokenizer: Tokenizer | None) -> Tokens:
    """Tokens of a split. Token files, ours or of other projects, are read by memory map. Any other source is encoded
    into the cache, unless it is there from an earlier call and the source has not changed.

    The cache is $MAMBA2_CACHE, by default ~/.cache/mamba2. Encoding takes the same memory for a source of any size.
    Raises ValueError if the split is empty, was made with another tokenizer, or holds text and `tokenizer` is None.
    """
    if is_synthetic(source):
        return synthetic_tokens(str(source), split)
    path = Path(source)
    if (path / SIDECAR).is_file():
        return open_tokens(path, split, tokenizer)
    cache = Path(os.environ.get("MAMBA2_CACHE") or Path.home() / ".cache" / "mamba2")
    if found := find_files(path, split):
        files, told = found
        return replace(open_foreign(files, cache, tokenizer), source=told)
    identity = "none" if tokenizer is None else tokenizer.identity
    key = "\n".join(["tokens 4", split, identity, fingerprint(source)])
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:24]
    if not folder.exists():
        prepare(folder, Plan({split: open_source(source, split)}, tokenizer), wait=True)
    return open_tokens(folder, split, tokenizer)


def load_validation(source: str | os.PathLike, tokenizer: Tokenizer | None) -> Tokens | None:
    """Tokens of the first of the splits validation, test that the source has, or None."""
    for split in VALIDATION_SPLITS:
        try:
            return load_tokens(source, split, tokenizer)
        except NoSplit:
            continue
    return None
