"""Token files that others wrote, read where they lie: nanoGPT's, and llm.c's and modded-nanogpt's shards.

nanoGPT: `train.bin` and `val.bin`, or any one file, of uint16 and nothing else. End of text is the model's tokenizer's.
llm.c: 256 int32 (magic 20240520, version 1, number of tokens), then uint16 of gpt2, whose end of text is 50256. Files
whose names say the same split, as in `fineweb_train_000001.bin`, are one sequence in the order of their names.

A document starts after each end of text. Where that is, and the hash of the content, are found in one pass of bounded
memory and kept in the cache.
"""

import hashlib
from pathlib import Path

import numpy as np

from mamba2.data.prepare import publish, working_folder
from mamba2.data.readers import refuse_pointer
from mamba2.data.splits import WORDS, Listing, list_files, splits_said
from mamba2.data.tokens import Tokens, edges_sha256, files_sha256, open_tokens, write_sidecar
from mamba2.tokenizer import Tokenizer

MAGIC, VERSION, HEADER = 20240520, 1, 1024  # HEADER in bytes
GPT2_EOT, GPT2_IDS = 50256, 50257
PIECE = 2**23  # ids scanned at a time


def find_files(path: Path, split: str) -> tuple[list[Path], dict] | None:
    """The .bin files of a split, and what the plan says of all files; None if `path` is not such data.

    Raises ValueError when it has no such split, or a name is ambiguous.
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

    Raises ValueError naming the file when it is cut short, has an unknown header, or does not fit the tokenizer.
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
    stats = [f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    key = hashlib.sha256("\n".join(["index 1", str(eot_id), *stats]).encode()).hexdigest()[:24]
    if not (cache / key).exists():
        _index(cache / key, files, header, eot_id, tokenizer)
    return open_tokens(cache / key, "train", tokenizer)


def _has_header(file: Path, files: list[Path]) -> bool:
    """Whether it is a shard of llm.c. Raises ValueError if it should be and is not, or has not the size it says."""
    refuse_pointer(file)
    size = file.stat().st_size
    start = np.fromfile(file, dtype="<i4", count=3)
    if len(start) < 3 or start[0] != MAGIC:
        if len(files) > 1 or (splits_said(file.stem) and file.stem not in WORDS):
            magic = start[0] if len(start) else "nothing"
            names = ", ".join(other.name for other in files[:3])
            several = (
                f"; a split of raw ids is one file, and here it is {len(files)}: {names}" if len(files) > 1 else ""
            )
            raise ValueError(f"{file} begins with {magic} and not with {MAGIC}, as a shard of llm.c does{several}")
        if size == 0 or size % 2:
            raise ValueError(f"{file} has {size} bytes: uint16 ids take an even number above 0; is it cut short?")
        return False
    if start[1] != VERSION:
        raise ValueError(f"{file} is a shard of llm.c of version {start[1]}; version {VERSION} (uint16) is supported")
    if size != HEADER + 2 * int(start[2]) or start[2] == 0:
        raise ValueError(f"{file} has {size} bytes and its header says {start[2]} tokens: it is cut short or empty")
    return True


def _index(folder: Path, files: list[Path], header: int, eot_id: int, tokenizer: Tokenizer | None) -> None:
    """Find the documents: one pass over the ids."""
    with working_folder(folder, wait=True) as work:
        if work is None:
            return
        position, largest, documents = 0, 0, 1
        with open(work / "train.starts", "wb") as starts:
            starts.write(np.zeros(1, dtype="<i8").tobytes())
            total = sum((file.stat().st_size - header) // 2 for file in files)
            for file in files:
                with open(file, "rb") as opened:
                    opened.seek(header)
                    while len(ids := np.frombuffer(opened.read(2 * PIECE), dtype="<u2")):
                        found = np.flatnonzero(ids == eot_id).astype("<i8") + position + 1
                        found = found[found < total]  # after the last one nothing starts
                        starts.write(found.tobytes())
                        position, largest = position + len(ids), max(largest, int(ids.max()))
                        documents += len(found)
        entry = {
            "files": [{"path": str(f.resolve()), "bytes": f.stat().st_size, "edges": edges_sha256(f)} for f in files],
            "header": header,
            "starts": "train.starts",
            "tokens": position,
            "documents": documents,
            "largest": largest,
            "sha256": files_sha256(files),
        }
        write_sidecar(work, {"train": entry}, tokenizer, eot_id, "<u2", {"sources": list(map(str, files))})
        publish(work, folder)
