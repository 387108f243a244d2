"""Model folders: `model.safetensors` (float32) and `config.json`, in the layout of `transformers.Mamba2ForCausalLM`.

Tensors have the names and shapes of `mamba2.model.tensor_shapes`. A tied lm_head is not stored. Every file is written
atomically, config.json last; README.md is the model card.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from mamba2.checkpoint.card import write_card
from mamba2.checkpoint.foreign import read_config
from mamba2.checkpoint.weights import (
    EMBEDDINGS,
    FLOATING,
    HEAD,
    INDEX_FILES,
    StoredTensor,
    equals,
    find_weights,
    list_tensors,
    read_tensors,
)
from mamba2.config import Mamba2Config
from mamba2.files import atomic_file, save_tensors, sha256, write_text
from mamba2.host_memory import require_memory

WEIGHTS = "model.safetensors"
SHARD_BYTES = 5 * 10**9


class Shapes(NamedTuple):
    """Functions of `mamba2.model`, which imports this module: a config's tensor shapes by name, and parameter count."""

    tensors: Callable[[Mamba2Config], dict[str, tuple[int, ...]]]
    parameters: Callable[[Mamba2Config], int]


def read_model(
    path: str | os.PathLike, shapes: Shapes, dtype: torch.dtype = torch.float32, finite: bool = False
) -> tuple[Mamba2Config, dict[str, torch.Tensor]]:
    """Read a model folder: its config, and the tensors in `dtype` under our names, lm_head included when tied.

    Accepts this layout, sharded with an index, or as `pytorch_model.bin`; mamba-ssm's (state-spaces' `mamba2-*`) with
    its own config.json; Codestral Mamba's (`params.json`, `consolidated.safetensors`). A key may be spelled
    `backbone.embedding.weight` or begin with `_orig_mod.`, `module.` or `model.`. Peak memory is the tensors'. Code in
    a pickle is never run. Weights that are not finite in `dtype` give a warning, or with `finite` a ValueError.

    Raises FileNotFoundError when the folder, a file or a shard is missing, ValueError naming the file when it is
    damaged or its tensors are not those of the config: same names and shapes, floating dtype.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no model folder at {path}")
    config = read_config(path)
    require_memory(shapes.parameters(config), dtype.itemsize)
    files = find_weights(path)
    stored = list_tensors(files)
    check_tensors(files, config, stored, shapes)
    tied_head = stored.pop(HEAD, None) if config.tie_word_embeddings else None
    tensors = read_tensors(stored, dtype)
    if broken := [name for name, tensor in tensors.items() if not torch.stack(tensor.aminmax()).isfinite().all()]:
        file = stored[broken[0]].file
        more = f" and {len(broken) - 1} other tensors hold" if len(broken) > 1 else " holds"
        problem = f"{file}: {broken[0]}{more} NaN or infinity in {str(dtype).removeprefix('torch.')}"
        if finite:
            raise ValueError(f"{problem}; nothing can be computed with such weights")
        print(f"warning: {problem}", file=sys.stderr, flush=True)
    if config.tie_word_embeddings:
        if tied_head is not None and not equals(tied_head, tensors[EMBEDDINGS]):
            raise ValueError(f"{tied_head.file}: {HEAD} differs from the embeddings that its config ties it to")
        tensors[HEAD] = tensors[EMBEDDINGS]
    return config, tensors


def write_model(
    path: str | os.PathLike,
    config: Mamba2Config,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
    facts: dict[str, str] | None = None,
) -> Path:
    """Write `tensors` (a Mamba2LM's state_dict), stored in `dtype`, and `config` into the folder `path`. Returns it.

    More than SHARD_BYTES become several files and an index, as transformers has them. `facts` are more rows of the
    model card. Raises OSError naming the file when it cannot be written; the old file is then unchanged.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    stored = {k: tensor.detach() for k, tensor in tensors.items() if not (config.tie_word_embeddings and k == HEAD)}
    shards, room = [{}], SHARD_BYTES
    for key, tensor in stored.items():
        size = tensor.numel() * dtype.itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][key] = tensor
        room -= size
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = [WEIGHTS] if len(shards) == 1 else names
    before = {path / WEIGHTS, path / INDEX_FILES[0], *path.glob("model-*-of-*.safetensors")}
    for name, shard in zip(names, shards):
        try:
            with atomic_file(path / name) as temporary:
                held = {key: tensor.to("cpu", dtype).contiguous() for key, tensor in shard.items()}
                save_tensors(temporary, held, metadata={"format": "pt"})
        except OSError as error:
            raise OSError(f"cannot write {path / name}: {error}") from error
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards) for key in shard}
        total = sum(tensor.numel() for tensor in stored.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_text(path / INDEX_FILES[0], json.dumps(index, indent=2) + "\n")
        names.append(INDEX_FILES[0])
    for old in before - {path / name for name in names}:
        old.unlink(missing_ok=True)
    write_card(path, config, sum(tensor.numel() for tensor in stored.values()), facts or {})
    # This option is about initialisation, but transformers 5 would also rescale the weights that it loads.
    dataclasses.replace(config, rescale_prenorm_residual=False).save(path)
    return path


def weights_sha256(folder: Path) -> str:
    """The hash of a model folder's weights; of several files that of their hashes."""
    hashes = [sha256(file) for file in find_weights(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def check_tensors(files: list[Path], config: Mamba2Config, stored: dict[str, StoredTensor], shapes: Shapes) -> None:
    """Raise ValueError listing every tensor that is missing, unknown, or of a wrong shape or dtype."""
    place = files[0] if len(files) == 1 else files[0].parent
    if config.num_hidden_layers > len(stored):  # the number may be absurd, and the list of missing tensors endless
        raise ValueError(
            f"{place} does not fit its config: it holds {len(stored)} tensors, too few for "
            f"num_hidden_layers = {config.num_hidden_layers}"
        )
    wanted = shapes.tensors(config)
    problems = []
    if missing := wanted.keys() - stored.keys() - ({HEAD} if config.tie_word_embeddings else set()):
        problems.append(f"missing {', '.join(sorted(missing))}")
    if unexpected := stored.keys() - wanted.keys():
        problems.append(f"unexpected {', '.join(sorted(unexpected))}")
    for key, tensor in stored.items():
        if key in wanted and tensor.shape != wanted[key]:
            problems.append(f"{key} has shape {tensor.shape} instead of {wanted[key]}")
        if key in wanted and tensor.dtype not in FLOATING:
            problems.append(f"{key} is {tensor.dtype}, and weights must be floating")
    if problems:
        raise ValueError(f"{place} does not fit its config: {'; '.join(problems)}")
