"""Decoding on a GPU as one launch per token: `Mamba2LM.step` captured in a CUDA graph.

Not run yet on a GPU: nothing here has been seen to work but the code that it captures, which the tests run without one.
"""

import torch

from mamba2.model import Mamba2LM, MixerState

WARM_UPS = 3  # steps before the capture: kernels are compiled, workspaces allocated


class GraphDecoder:
    """A model on a GPU with the state of b rows, advanced in place; no gradients. Captured at the first step."""

    def __init__(self, model: Mamba2LM, state: list[MixerState]):
        """Start from `state`, which is copied. The parameters must stay where they are; their values may change."""
        self.model, self._state = model, [s.rows(slice(None)) for s in state]
        self._graph = None

    @torch.no_grad()
    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Take one token per row, (b,) int64; returns logits (b, v), which the next call overwrites."""
        with torch.cuda.device(self._state[0].ssm.device):
            if self._graph is None:
                self._capture(input_ids)
            self._ids.copy_(input_ids)
            self._graph.replay()
        return self._logits

    def state(self) -> list[MixerState]:
        """A copy of the state."""
        return [s.rows(slice(None)) for s in self._state]

    def _capture(self, input_ids: torch.Tensor) -> None:
        self._ids = input_ids.clone()
        start = self.state()  # what the warming up must not change
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.model.step(self._ids, self._state)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits, _ = self.model.step(self._ids, self._state)
        for current, before in zip(self._state, start, strict=True):
            current.conv.copy_(before.conv)
            current.ssm.copy_(before.ssm)
