"""MAMBA2_AUTOTUNE=1 for ssd: its choice for each shape, and the times with it and with the table's launches."""

import functools
import os
import tempfile
from unittest import mock

import torch

from benchmarks.gpu.fast import SHAPES, make_tensors
from benchmarks.gpu.worker import Bench, Case
from mamba2.ops import autotune, ssd


def cases(bench: Bench) -> dict[str, Case]:
    shapes = [(1, 9, 2, 16, 1, 20)] if bench.rehearse else SHAPES
    found: dict[str, Case] = {}
    for shape in shapes:
        for training in (True, False):
            title = f"{shape}, {'documents' if training else 'plain'}"
            found[title] = functools.partial(compare, bench, shape, training)
    return found


def compare(bench: Bench, shape: tuple[int, ...], training: bool) -> dict[str, object]:
    tensors = make_tensors(shape, bench.device, training)
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]

    def both() -> None:
        y = ssd(**tensors, chunk_size=256, dt_softplus=True, return_final_states=training)
        y = y[0] if training else y
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    both()
    before = bench.milliseconds(both)
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, MAMBA2_AUTOTUNE="1", MAMBA2_CACHE=cache),
    ):
        both()
        after = bench.milliseconds(both)
        chosen = {key.split(",")[0]: value for key, value in autotune.read().items()}
    return {"table's ms": before, "tuned ms": after, "gain": before / max(after, 1e-9), "chosen": chosen}
