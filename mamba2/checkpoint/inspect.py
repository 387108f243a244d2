"""Describe a model folder: config, parameters, time constants, and what in them looks wrong."""

import argparse
import json
import math
import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F

from mamba2.checkpoint.foreign import read_config
from mamba2.checkpoint.model_folder import check_tensors
from mamba2.checkpoint.weights import EMBEDDINGS, HEAD, StoredTensor, find_weights, list_tensors, read_tensors
from mamba2.config import Mamba2Config
from mamba2.initializers import INITIALIZERS, dt_bias_sha256, dt_table
from mamba2.model import SHAPES, Mamba2LM, num_parameters
from mamba2.tokenizer import Tokenizer, find_tokenizer

EXCHANGED = 0.25  # nats per token: far above what it changes in a model that was not trained


def report(path: str | os.PathLike, reads_text: bool = True) -> tuple[str, list[str]]:
    """The config, a table of the parameters, one of dt and half-lives, and what `suspicions` found; then that alone.
    With `reads_text` the model is loaded for `exchanged`, too. Raises what `read_model` raises."""
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
    found, tokenizer = suspicions(config, dt_bias, A_log), find_tokenizer(folder)
    why_not = "it was not asked for" if not reads_text else "there is no tokenizer" if tokenizer is None else None
    if why_not is None:
        found += exchanged(Mamba2LM.from_pretrained(folder), tokenizer)
    text = "\n".join(
        [
            f"{folder}: {num_parameters(config):,} parameters, {', '.join(file.name for file in files)}",
            json.dumps(config.to_dict(), indent=2),
            "",
            parameter_table(stored, config.tie_word_embeddings),
            "",
            f"initialised by: {config.initialization or 'not recorded'}",
            dt_table(dt_bias, A_log.double().exp()) if dt_bias.isfinite().all() and A_log.isfinite().all() else "",
            "",
            *([f"whether z and x are exchanged in in_proj was not checked: {why_not}"] if why_not else []),
            *(f"suspicious: {what}" for what in found or ["nothing"]),
        ]
    )
    return text, found


def suspicions(config: Mamba2Config, dt_bias: torch.Tensor, A_log: torch.Tensor) -> list[str]:
    """What in dt_bias and A_log, (L, h), looks as if an initialisation had not reached it, or twice, or loading had
    reset it. What the config records as intended (`ones`, a factor of A) is not."""
    found = []
    dt, A = F.softplus(dt_bias.double()), A_log.double().exp()
    low, high = config.time_step_min, config.time_step_max
    record, factors = config.dt_bias_init or {}, config.factors_init or {}
    initializer = INITIALIZERS["dt_bias"].get(record.get("name"))
    bounded = initializer is None or "t_min" in initializer.parameters  # dt of the others knows no range
    if not dt_bias.isfinite().all():
        found.append(
            "dt_bias is not finite: softplus was inverted for numbers that are not positive, as when done twice"
        )
    elif (dt_bias == 1).all() and record.get("name") != "ones":
        found.append("dt_bias is 1 everywhere, as torch.ones left it: no initialisation reached it, and dt is 1.31")
    elif (dt_bias == 0).all():
        found.append("dt_bias is 0 everywhere: no initialisation reached it, and dt is 0.69")
    elif ((dt_bias >= 0.99 * low) & (dt_bias <= 1.01 * high)).all():
        found.append(
            f"dt_bias is in the range of dt, {low:g} to {high:g}: softplus was not inverted, and dt is near 0.7"
        )
    elif bounded and not low / 10 <= dt.median() <= 10 * high:
        found.append(f"the median of dt is {dt.median():.3g}, far from time_step_min and max, {low:g} to {high:g}")
    heads = torch.arange(1.0, dt_bias.shape[1] + 1)
    if not A_log.isfinite().all():
        found.append("A_log is not finite")
    elif (A_log == 0).all() and "A" not in factors:
        found.append("A_log is 0 everywhere, so A is 1: no initialisation reached it")
    elif len(heads) > 1 and torch.allclose(A_log, heads.expand_as(A_log)):
        found.append("A_log is 1, 2, 3, …: the logarithm was not taken, and A grows to e^nheads")
    elif (
        not found
        and "A" not in factors
        and len(heads) > 1
        and torch.allclose(A, heads.double().expand_as(A), rtol=1e-6)
        and record.get("sha256", dt_bias_sha256(dt_bias)) != dt_bias_sha256(dt_bias)
    ):
        found.append(
            "A is 1, 2, 3, … as initialised, but dt_bias is not: A_log was reset after training, or had no rate"
        )
    return found


@torch.no_grad()
def exchanged(model: Mamba2LM, tokenizer: Tokenizer) -> list[str]:
    """Whether z and x seem to have been exchanged in in_proj, as by a conversion that took the one for the other: with
    them exchanged back, text is predicted better by EXCHANGED nats per token. Of a model that learnt something. (B and
    C cannot be told so: small models lose little without their states.)"""
    text = Path(argparse.__file__).read_text(encoding="utf-8")[:2000]  # English in the comments, and Python
    ids = torch.tensor([[tokenizer.eot_id, *tokenizer.encode(text)[:256]]])
    losses = []
    for _ in range(2):
        losses.append(model(ids[:, :-1], ids[:, 1:]).item() / (ids.shape[1] - 1))
        exchange(model)
    as_is, back = losses
    if back > as_is - EXCHANGED:
        return []
    return [
        f"z and x seem to be exchanged in in_proj: with them exchanged back a text has {back:.2f} nats per token, "
        f"not {as_is:.2f}"
    ]


@torch.no_grad()
def exchange(model: Mamba2LM) -> None:
    """Exchange the rows for z and for x of every Mamba-2 layer's in_proj, in place."""
    for mixer in model.mixers():
        z, x, *_ = mixer.in_proj.weight.split(mixer.in_proj_rows())
        kept = z.clone()
        z.copy_(x)
        x.copy_(kept)


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
