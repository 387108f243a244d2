"""Describe a model folder without building the model: config, parameters, time constants."""

import json
import math
import os
import re
from pathlib import Path

import torch

from mamba2.checkpoint.foreign import read_config
from mamba2.checkpoint.model_folder import check_tensors
from mamba2.checkpoint.weights import EMBEDDINGS, HEAD, StoredTensor, find_weights, list_tensors, read_tensors
from mamba2.initializers import dt_table
from mamba2.model import SHAPES, num_parameters


def report(path: str | os.PathLike) -> str:
    """The config, a table of the parameters, and one of dt and half-lives. Raises what `read_model` raises."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder at {folder}")
    config, files = read_config(folder), find_weights(folder)
    stored = list_tensors(files)
    check_tensors(files, config, stored, SHAPES)
    layers = [i for i in range(config.num_hidden_layers) if i not in config.attn_layer_idx]
    small = {name: s for name, s in stored.items() if name.endswith((".dt_bias", ".A_log"))}
    values = read_tensors(small, torch.float32)
    dt_bias, A_log = (
        torch.stack([values[f"backbone.layers.{i}.mixer.{name}"] for i in layers]) for name in ("dt_bias", "A_log")
    )
    origin = config.dt_bias_init["name"] if config.dt_bias_init else "not recorded"
    return "\n".join(
        [
            f"{folder}: {num_parameters(config):,} parameters, {', '.join(file.name for file in files)}",
            json.dumps(config.to_dict(), indent=2),
            "",
            parameter_table(stored, config.tie_word_embeddings),
            "",
            f"dt_bias initialised by: {origin}",
            dt_table(dt_bias, A_log.double().exp()),
        ]
    )


def parameter_table(stored: dict[str, StoredTensor], tied: bool) -> str:
    """One line per tensor; those that every layer has share a line."""
    groups: dict[str, list[StoredTensor]] = {}
    for name, tensor in stored.items():
        if not (tied and name == HEAD and EMBEDDINGS in stored):
            groups.setdefault(re.sub(r"layers\.\d+\.", "layers.*.", name), []).append(tensor)
    width = max(map(len, groups))
    lines = [f"{'tensor':{width}}  {'count':>5}  {'shape':>16}  {'dtype':>8}  {'parameters':>14}"]
    total = 0
    for name, tensors in sorted(groups.items()):
        size = sum(math.prod(t.shape) for t in tensors)
        total += size
        shape = " x ".join(map(str, tensors[0].shape))
        lines.append(f"{name:{width}}  {len(tensors):5}  {shape:>16}  {tensors[0].dtype:>8}  {size:14,}")
    lines.append(f"{'total':{width}}  {'':5}  {'':16}  {'':8}  {total:14,}")
    return "\n".join(lines)
