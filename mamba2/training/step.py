"""One optimizer step over the global batch, and one evaluation."""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from mamba2.data import Windows
from mamba2.device import widen
from mamba2.distributed import ALONE, World, full, gradient_sync, reshard
from mamba2.mixer import MixerState
from mamba2.model import Mamba2LM
from mamba2.ops import IGNORE_INDEX
from mamba2.training.hardware import autocast
from mamba2.training.initial_state import InitialStates


def accumulate_gradients(
    model: nn.Module,
    windows: Windows,
    indices: list[int],
    micro_batch: int,
    dtype: torch.dtype,
    world: World = ALONE,
    add: Callable | None = None,
    states: InitialStates | None = None,
) -> tuple[float, int]:
    """Add the gradient of the mean loss over every token of the windows `indices`, `micro_batch` windows at a time.

    The mean is over the tokens of the whole batch, so it does not depend on how the batch is split into micro-batches
    and among the processes of `world`. `add(batch, tokens, total)` replaces `add_gradients` if given. `states`: what
    the windows start from, and what they end with afterwards; None: empty states.
    Returns (mean loss in nats per token, number of tokens), the same in every process.
    """
    device = next(model.parameters()).device
    batches = _micro_batches(windows, indices, micro_batch, world)
    tokens = int(world.sum(torch.tensor(sum(_count(targets) for _, targets, _ in batches))))
    # The sum stays on the device: reading it after every micro-batch would synchronise with the GPU.
    total = widen(torch.zeros((), device=device))
    add = add or functools.partial(add_gradients, model, dtype, world.size)
    for i, batch in enumerate(batches):
        rows = slice(i * micro_batch, i * micro_batch + len(batch[0]))
        with gradient_sync(model, wanted=i == len(batches) - 1):
            if states is None:
                add(_to(batch, device), tokens, total)
            else:
                states.put(rows, add(_to(batch, device), tokens, total, states.take(rows)))
    return world.sum(total).item(), tokens


def add_gradients(
    model: nn.Module,
    dtype: torch.dtype,
    processes: int,
    batch: Sequence[torch.Tensor | None],
    tokens: int | torch.Tensor,
    total: torch.Tensor,
    state: list[MixerState] | None = None,
) -> list[MixerState] | None:
    """Backward of one micro-batch's summed loss / tokens, and add that loss to `total`. Nothing here synchronises with
    the device, so a CUDA graph can capture it. With a `state` to start from, returns the one after the last token."""
    inputs, targets, seq_idx = batch
    with autocast(total.device, dtype):
        result = model(inputs, targets, seq_idx=seq_idx, state=state, return_state=state is not None)
    loss, state = (result, None) if state is None else result
    loss = loss / tokens
    (loss * processes).backward()  # DDP and FSDP average over the processes; we need the sum
    total += loss.detach()
    return state


def update(
    model: Mamba2LM, optimizer: torch.optim.Optimizer, clip: float, keep_gradients: bool = False
) -> float | None:
    """Clip the gradient's norm to `clip` (0: not at all) and make an optimizer step, unless the norm is not finite.

    Returns the norm before clipping, or None if it was not finite. Afterwards the gradients are None, or with
    `keep_gradients` zero, as a CUDA graph needs them.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = full(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
    value = norm.item()
    if finite := math.isfinite(value):
        if clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=not keep_gradients)
    return value if finite else None


@torch.no_grad()
def mean_loss(
    model: Mamba2LM, windows: Windows, count: int, micro_batch: int, dtype: torch.dtype, world: World = ALONE
) -> float:
    """Mean loss in nats per token over `count` windows spread evenly over the data, the same ones at every call."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    sums = widen(torch.zeros(2, device=device))  # loss, tokens
    for batch in _micro_batches(windows, spread(len(windows), count), micro_batch, world):
        inputs, targets, seq_idx = _to(batch, device)
        with autocast(device, dtype):
            losses, _ = model.token_losses(inputs, targets, seq_idx)
        sums[0] += losses.sum(dtype=sums.dtype)
        sums[1] += _count(targets)
    reshard(model)
    model.train(training)
    total, tokens = world.sum(sums).tolist()
    return total / tokens


def spread(size: int, count: int) -> list[int]:
    """At most `count` indices from range(size), evenly spaced."""
    count = min(size, count)
    return [i * size // count for i in range(count)]


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def _micro_batches(windows: Windows, indices: list[int], micro_batch: int, world: World) -> list[Batch]:
    """This process's windows. All processes must run equally many micro-batches, because FSDP gathers weights in each.
    A process with one window fewer than the others gets one whose targets are ignored."""
    mine = world.share(indices)
    missing = -(-len(indices) // world.size) - len(mine)
    mine += indices[:1] * missing
    batches = [windows.batch(mine[i : i + micro_batch]) for i in range(0, len(mine), micro_batch)]
    if missing:
        batches[-1][1][-1] = IGNORE_INDEX
    return batches


def _count(targets: torch.Tensor) -> int:
    return int((targets != IGNORE_INDEX).sum())


def _to(tensors: tuple[torch.Tensor | None, ...], device: torch.device) -> list[torch.Tensor | None]:
    if device.type == "cuda":  # copies from pageable memory are synchronous
        tensors = tuple(tensor if tensor is None else tensor.pin_memory() for tensor in tensors)
    return [None if tensor is None else tensor.to(device, non_blocking=True) for tensor in tensors]
