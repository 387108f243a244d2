"""One optimizer step over the global batch, and one evaluation."""

from collections.abc import Iterator

import torch
from torch import nn

from mamba2.data import Windows
from mamba2.model import Mamba2LM
from mamba2.ops import IGNORE_INDEX
from mamba2.training.hardware import autocast


def accumulate_gradients(
    model: nn.Module,
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
    batches = [windows.batch(chosen) for chosen in _slices(indices, micro_batch)]
    tokens = sum(int((targets != IGNORE_INDEX).sum()) for _, targets, _ in batches)
    # The sum stays on the device: reading it after every micro-batch would make a GPU wait.
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        inputs, targets, seq_idx = _to(batch, device)
        with autocast(device, dtype):
            loss = model(inputs, targets, seq_idx=seq_idx) / tokens
        loss.backward()
        total += loss.detach()
    return total.item(), tokens


def update(model: Mamba2LM, optimizer: torch.optim.Optimizer, clip: float) -> float | None:
    """Clip the gradient's norm to `clip` (0: do not) and step; without a finite gradient nothing moves.

    Returns the norm before clipping, None where it was not finite. Gradients are gone afterwards.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    value = norm.item()
    finite = bool(torch.isfinite(torch.tensor(value)))
    if finite:
        if clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value if finite else None


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
