"""Weight files of any layout: safetensors or torch's zip format, sharded or not.

Files are memory-mapped, and pages that were read count as this process's memory until the file is closed. So tensors
are copied in pieces, and the file is reopened every few pieces: peak memory is the model plus about 20 MB.
"""

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

EMBEDDINGS, HEAD = "backbone.embeddings.weight", "lm_head.weight"
# Prefixes that wrappers add to every key: torch.compile, DistributedDataParallel, mistral-inference.
PREFIXES = ("_orig_mod.", "module.", "model.")
# In order of preference; an index lists the shards of one of the two formats.
WEIGHT_FILES = ("model.safetensors", "consolidated.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "consolidated.safetensors.index.json", "pytorch_model.bin.index.json")
# As safetensors and as torch spell them. Integer weights would need scales, which no layout here stores.
FLOATING = {"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"}
PIECE_BYTES = 4 * 2**20
REOPEN_BYTES = 4 * PIECE_BYTES


@dataclass(frozen=True)
class StoredTensor:
    file: Path
    key: str  # as the file spells it
    shape: tuple[int, ...]
    dtype: str


def our_name(key: str) -> str:
    """The name of a tensor as `mamba2.checkpoint.model_folder` lists them."""
    while prefix := next((p for p in PREFIXES if key.startswith(p)), None):
        key = key.removeprefix(prefix)
    return EMBEDDINGS if key == "backbone.embedding.weight" else key


def find_weights(folder: Path) -> list[Path]:
    """The weight files of a folder.

    Raises FileNotFoundError when there are none or a shard is missing, ValueError when an index cannot be read or names
    the wrong shard for a tensor.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
    index = next((folder / name for name in INDEX_FILES if (folder / name).is_file()), None)
    if index is None:
        raise FileNotFoundError(f"no model.safetensors in {folder}, nor {', '.join(WEIGHT_FILES[1:])} or their index")
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(places.values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of shards: {error!r}") from error
    if not shards:
        raise ValueError(f"{index} names no shard: its weight_map is empty")
    for shard in shards:
        if not isinstance(shard, str):
            raise ValueError(f"{index} names {shard!r} as a shard, and must name files")
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise FileNotFoundError(f"{index} names the shard {shard}, which is not in {folder}")
    for shard in shards:
        with _opened(folder / shard) as (keys, _, _):
            if elsewhere := sorted(key for key, file in places.items() if file == shard and key not in keys):
                raise ValueError(f"{index} says that {elsewhere[0]} lies in {shard}, which does not hold it")
    return [folder / shard for shard in shards]


def list_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """Every tensor in the files, by our name. Raises ValueError naming a file that is damaged or holds anything but
    tensors, or two keys for one tensor."""
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        with _opened(file) as (keys, describe, _):
            for key in keys:
                name = our_name(key)
                if name in tensors:
                    raise ValueError(f"{file} holds {name} twice: as {tensors[name].key} and as {key}")
                tensors[name] = StoredTensor(file, key, *describe(key))
    return tensors


def read_tensors(stored: dict[str, StoredTensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Copies of the stored tensors in `dtype`, by our name."""
    tensors = {name: torch.empty(s.shape, dtype=dtype) for name, s in stored.items()}
    for file in sorted({s.file for s in stored.values()}):
        pieces = [piece for name, s in stored.items() if s.file == file for piece in _pieces(s.key, tensors[name])]
        while pieces:
            with _opened(file) as (_, _, read):
                budget = REOPEN_BYTES
                while pieces and budget > 0:
                    key, start, target = pieces.pop()
                    piece = read(key, start, start + len(target))
                    target.copy_(piece)
                    budget -= piece.nbytes
    return tensors


def equals(stored: StoredTensor, tensor: torch.Tensor) -> bool:
    """Whether a stored tensor, converted to the dtype of `tensor`, equals it."""
    for key, start, rows in _pieces(stored.key, tensor):
        with _opened(stored.file) as (_, _, read):
            if not torch.equal(read(key, start, start + len(rows)).to(rows.dtype), rows):
                return False
    return True


def _pieces(key: str, target: torch.Tensor) -> Iterator[tuple[str, int, torch.Tensor]]:
    """(key, first row, those rows of `target`), about PIECE_BYTES at a time."""
    rows = max(1, PIECE_BYTES * len(target) // max(target.nbytes, 1))
    for start in range(0, len(target), rows):
        yield key, start, target[start : start + rows]


@contextmanager
def _opened(file: Path) -> Iterator[tuple[list[str], Callable, Callable]]:
    """Open a weight file. Yields its keys, a function key -> (shape, dtype), and one (key, start, stop) -> rows."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                yield (
                    list(opened.keys()),
                    lambda key: (tuple(opened.get_slice(key).get_shape()), opened.get_slice(key).get_dtype()),
                    lambda key, start, stop: opened.get_slice(key)[start:stop],
                )
        except SafetensorError as error:
            raise ValueError(f"{file} is not a readable safetensors file, perhaps cut short: {error}") from error
        return
    try:
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file} holds more than tensors and is refused; nothing in it was run: {reason}") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{file} is not a readable checkpoint of torch (1.6 or later): {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError(f"{file} holds no dictionary of tensors")
    if wrong := [key for key in tensors if not isinstance(key, str)]:
        raise ValueError(f"{file} holds a tensor under the key {wrong[0]!r}, and names must be text")
    yield (
        list(tensors),
        lambda key: (tuple(tensors[key].shape), str(tensors[key].dtype).removeprefix("torch.")),
        lambda key, start, stop: tensors[key][start:stop],
    )
