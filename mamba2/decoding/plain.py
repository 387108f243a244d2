"""Decoding with `Mamba2LM.step`, directly or as a CUDA graph."""

import torch

from mamba2.cuda_graph import capture
from mamba2.model import Mamba2LM, State


class PlainDecoder:
    """`Mamba2LM.step` with a state of its own, on any device and backend."""

    def __init__(self, model: Mamba2LM, state: list[State]):
        """Start from a copy of `state`."""
        self.model, self._state = model, [s.rows(slice(None)) for s in state]

    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Take one token per row, (b,) int64; returns logits (b, v)."""
        return self.model.step(input_ids, self._state)[0]

    def state(self) -> list[State]:
        """A copy of the state."""
        return [s.rows(slice(None)) for s in self._state]


class GraphDecoder(PlainDecoder):
    """The same as a CUDA graph, captured at the first step. The parameters' values may change, their memory may not."""

    _graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Take one token per row, (b,) int64; returns logits (b, v), which the next call overwrites."""
        with torch.cuda.device(self._state[0].ssm.device):
            if self._graph is None:
                self._capture(input_ids)
            self._ids.copy_(input_ids)
            self._graph.replay()
        return self._logits

    def _capture(self, input_ids: torch.Tensor) -> None:
        self._ids = input_ids.clone()
        start = self.state()  # the warm-up runs change the state
        self._graph, (self._logits, _) = capture(lambda: self.model.step(self._ids, self._state))
        for current, before in zip(self._state, start, strict=True):
            current.copy_(before)
