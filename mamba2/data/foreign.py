"""Token files of other projects, read without a copy: nanoGPT's, and the shards of llm.c and modded-nanogpt.

nanoGPT: `train.bin` and `val.bin`, or any one file, of uint16 ids without a header. The model's tokenizer says which id
ends a document.
llm.c: a header of 256 int32 (magic 20240520, version 1, number of tokens), then uint16 ids of gpt2 (end of text 50256).
Files whose names say the same split, as in `fineweb_train_000001.bin`, are one sequence in the order of their names.

A document starts after each end of text. One pass over the ids finds these places and the hash of the content, with
little memory; the result is kept in the cache.
"""

from pathlib import Path

import numpy as np

from mamba2.data.prepare import publish, working_folder
from mamba2.data.readers import refuse_pointer
from mamba2.data.splits import WORDS, Listing, list_files, splits_said, stats_hash
from mamba2.data.tokens import Shards, Tokens, edges_sha256, files_sha256, open_tokens, write_sidecar
from mamba2.tokenizer import Tokenizer

MAGIC, VERSION, HEADER = 20240520, 1, 1024  # HEADER in bytes
GPT2_EOT, GPT2_IDS = 50256, 50257
PIECE = 2**23  # ids scanned at a time


def find_files(path: Path, split: str) -> tuple[list[Path], dict] | None:
    """The .bin files of a split, and the `told` of all files for `describe`; None if `path` is not such data.

    Raises ValueError if there is no such split, or a name is ambiguous.
    """
    if path.is_file() and path.suffix == ".bin":
        listing = Listing(path.parent, {"train": [path]}, {})
    elif path.is_dir() and any(splits_said(file.name) for file in path.glob("*.bin")):
        listing = list_files(path, sorted(path.iterdir()), lambda file: file.suffix == ".bin", ".bin")
    else:
        return None
    split = listing.choose(split, ".bin")
    return listing.splits[split], {"split": split, **listing.told()}


def open_foreign(files: list[Path], cache: Path, tokenizer: Tokenizer | None) -> Tokens:
    """The ids of `files` as one sequence.

    Raises ValueError naming the file if it is cut short, has an unknown header, or does not fit the tokenizer.
    """
    headers = [_has_header(file, files) for file in files]
    if any(headers) != all(headers):
        raise ValueError(f"{files[headers.index(False)]} has no header of llm.c, and others beside it do")
    if all(headers):
        if tokenizer is not None and (tokenizer.eot_id, tokenizer.vocab_size) != (GPT2_EOT, GPT2_IDS):
            raise ValueError(f"{files[0]} holds ids of the tokenizer gpt2, and the model has {tokenizer.name}")
        header, eot_id = HEADER, GPT2_EOT
    elif tokenizer is None:
        raise ValueError(f"{files[0]} does not say which id ends a document, and the model carries no tokenizer")
    else:
        header, eot_id = 0, tokenizer.eot_id
    folder = cache / stats_hash(files, "index 2", str(eot_id))[:24]
    if not folder.exists():
        _index(folder, files, header, eot_id, tokenizer)
    return open_tokens(folder, "train", tokenizer)


def _has_header(file: Path, files: list[Path]) -> bool:
    """Whether `file` is a shard of llm.c. Raises ValueError if its name or the number of files says so and its header
    does not, or if its size is not what the header says."""
    refuse_pointer(file)
    size = file.stat().st_size
    start = np.fromfile(file, dtype="<i4", count=3)
    if len(start) < 3 or start[0] != MAGIC:
        if len(files) > 1 or (splits_said(file.stem) and file.stem not in WORDS):
            magic = start[0] if len(start) else "nothing"
            several = f"; a split of raw ids is one file, and here it is {len(files)}: " if len(files) > 1 else ""
            names = ", ".join(other.name for other in files[:3]) if several else ""
            raise ValueError(
                f"{file} begins with {magic} and not with {MAGIC}, as a shard of llm.c does{several}{names}"
            )
        if size == 0 or size % 2:
            raise ValueError(f"{file} has {size} bytes: uint16 ids take an even number above 0; is it cut short?")
        return False
    if start[1] != VERSION:
        raise ValueError(f"{file} is a shard of llm.c of version {start[1]}; version {VERSION} (uint16) is supported")
    if size != HEADER + 2 * int(start[2]) or start[2] == 0:
        raise ValueError(f"{file} has {size} bytes and its header says {start[2]} tokens: it is cut short or empty")
    return True


def _index(folder: Path, files: list[Path], header: int, eot_id: int, tokenizer: Tokenizer | None) -> None:
    """Find where documents start, in one pass over the ids."""
    with working_folder(folder, wait=True) as work:
        if work is None:
            return
        ids, largest = Shards([np.memmap(file, "<u2", mode="r", offset=header) for file in files]), 0
        with open(work / "train.starts", "wb") as starts:
            np.zeros(1, dtype="<i8").tofile(starts)
            for at in range(0, len(ids), PIECE):
                piece = ids[at : at + PIECE]
                found = np.flatnonzero(piece == eot_id).astype("<i8") + at + 1
                found[found < len(ids)].tofile(starts)  # no document starts after the last id
                largest = max(largest, int(piece.max()))
            documents = starts.tell() // 8
        entry = {
            "files": [{"path": str(f.resolve()), "bytes": f.stat().st_size, "edges": edges_sha256(f)} for f in files],
            "header": header,
            "starts": "train.starts",
            "tokens": len(ids),
            "documents": documents,
            "largest": largest,
            "sha256": files_sha256(files),
        }
        write_sidecar(work, {"train": entry}, tokenizer, eot_id, "<u2", {"sources": list(map(str, files))})
        publish(work, folder)
