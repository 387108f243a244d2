"""CUDA graphs: a token of decoding, or forward and backward of a micro-batch, as one launch.

Not run yet on a GPU: nothing here has been seen to work but the code that it captures, which the tests run without one.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import torch

from mamba2.model import Mamba2LM

T = TypeVar("T")
WARM_UPS = 3  # runs before the capture: kernels are compiled, workspaces allocated


def capture(run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """Run it WARM_UPS times, then record it. Returns the graph and what it returned, which every replay overwrites."""
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
    """`add(batch, tokens, total)`, which adds the gradient of a micro-batch, captured once for each shape of batch.

    The gradients must stay where they are from step to step: zeroed, not freed.
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
            # In a mean over infinitely many tokens the warming up adds nothing.
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
