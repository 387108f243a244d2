"""CUDA graphs: one decoding step, or forward and backward of one micro-batch, as a single launch.

Not yet run on a GPU. The tests run the captured code without one; the capture itself is untested.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import torch

from mamba2.model import Mamba2LM

T = TypeVar("T")
WARM_UPS = 3  # runs before the capture, to compile kernels and allocate workspaces


def capture(run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """Call `run` WARM_UPS times, then capture it. Returns the graph and run's result, which every replay overwrites."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


class GraphGradients:
    """`add(batch, tokens, total)` as a CUDA graph, captured once for each shape of batch.

    `add` adds the gradient of a micro-batch. The gradients must keep their memory from step to step: zero them, do not
    set them to None.
    """

    def __init__(self, model: Mamba2LM, add: Callable):
        self.model, self.add, self._captured = model, add, {}

    def __call__(self, batch: list[torch.Tensor | None], tokens: int, total: torch.Tensor) -> None:
        shape = tuple(None if tensor is None else tensor.shape for tensor in batch)
        if shape not in self._captured:
            for parameter in self.model.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            place = [None if tensor is None else tensor.clone() for tensor in batch]
            # During warm-up the loss is divided by infinity, so the gradients added are zero.
            divisor, loss = torch.full((), math.inf, device=total.device), torch.zeros_like(total)
            graph, _ = capture(lambda: self.add(place, divisor, loss))
            self._captured[shape] = graph, place, divisor, loss
        graph, place, divisor, loss = self._captured[shape]
        for target, tensor in zip(place, batch, strict=True):
            if tensor is not None:
                target.copy_(tensor)
        divisor.fill_(tokens)
        loss.zero_()
        graph.replay()
        total += loss
