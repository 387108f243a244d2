"""What train.py calls: device and precision, optimizer, schedule, one step, one evaluation. No argument parsing."""

import contextlib
import math
from collections.abc import Iterator

import torch

from mamba2.data import Windows
from mamba2.model import Mamba2LM
from mamba2.ops import IGNORE_INDEX


def choose_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Dtype of the matrix products: `bf16`, `fp32`, or `auto`: bf16 on a GPU and on a processor that computes in it."""
    if name == "auto":
        capabilities = torch.cpu.get_capabilities()
        in_hardware = device.type == "cuda" or capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
        name = "bf16" if in_hardware else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Matrix products in `dtype` over float32 weights; dt, A, norms and losses stay in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def make_optimizer(
    model: Mamba2LM, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW with decay on matrices only: not on dt_bias, A_log, D, norms, biases, convolution."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    # Fused: one pass over weights and moments, where the step is bound by memory.
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=True)


def learning_rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Share of the peak rate at `step` of `steps`: linear warm-up from 1/warmup_steps, then a cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def accumulate_gradients(
    model: Mamba2LM,
    windows: Windows,
    indices: list[int],
    micro_batch: int,
    dtype: torch.dtype,
) -> tuple[float, int]:
    """Add the gradient of the mean loss over every token of the windows `indices`, `micro_batch` windows at a time.

    The mean is over the tokens of the whole batch, so it does not depend on how the batch is split.
    Returns (mean loss in nats per token, tokens).
    """
    device = next(model.parameters()).device
    batches = [windows.batch(indices[i : i + micro_batch]) for i in range(0, len(indices), micro_batch)]
    tokens = sum(int((targets != IGNORE_INDEX).sum()) for _, targets, _ in batches)
    total = 0.0
    for batch in batches:
        inputs, targets, seq_idx = _to(batch, device)
        with autocast(device, dtype):
            loss = model(inputs, targets, seq_idx=seq_idx) / tokens
        loss.backward()
        total += loss.item()
    return total, tokens


@torch.no_grad()
def mean_loss(model: Mamba2LM, windows: Windows, count: int, micro_batch: int, dtype: torch.dtype) -> float:
    """Mean loss in nats per token over `count` windows spread evenly over the set: the same ones at every call."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for chosen in _slices(spread(len(windows), count), micro_batch):
        inputs, targets, seq_idx = _to(windows.batch(chosen), device)
        with autocast(device, dtype):
            losses, _ = model.token_losses(inputs, targets, seq_idx)
        total += losses.sum(dtype=torch.float64).item()
        tokens += int((targets != IGNORE_INDEX).sum())
    model.train(training)
    return total / tokens


def spread(size: int, count: int) -> list[int]:
    """At most `count` of range(size), evenly spaced."""
    count = min(size, count)
    return [i * size // count for i in range(count)]


def _slices(items: list[int], length: int) -> Iterator[list[int]]:
    return (items[i : i + length] for i in range(0, len(items), length))


def _to(tensors: tuple[torch.Tensor | None, ...], device: torch.device) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.to(device, non_blocking=True) for tensor in tensors]
