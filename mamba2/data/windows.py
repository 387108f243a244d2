"""Tokens to batches. The order depends only on the seed and the step."""

import numpy as np
import torch

from mamba2.data.tokens import Tokens
from mamba2.ops import IGNORE_INDEX

STRETCH = 16  # windows that a row reads on with continued states
INITIAL_STATES = ("zero", "noise", "passed", "continued")  # what a window of training starts from


class Windows:
    """Windows of T + 1 tokens, one every T tokens. The last window is padded, and the padding does not count.

    Each epoch is a permutation of the windows, drawn from the seed and the epoch. Step s takes the samples
    s · batch to (s + 1) · batch - 1 of these epochs in order. A permutation takes 4 bytes per window: 37 MB for 9.4
    billion tokens at T = 1024, 400 MB and some seconds for 100 million windows.
    """

    def __init__(self, tokens: Tokens, length: int, reset: bool = True):
        """`length` is T. `reset`: whether state and convolution restart at each document.

        Raises ValueError if windows of T tokens would cut the samples of a synthetic task.
        """
        if tokens.sample_length and length % tokens.sample_length:
            raise ValueError(
                f"windows of {length} tokens cut samples of {tokens.sample_length}; make T a multiple of it"
            )
        self.tokens, self.length, self.reset = tokens, length, reset
        self._permutation: tuple[tuple[int, int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        return max(1, -(-(len(self.tokens.ids) - 1) // self.length))

    def indices(self, seed: int, step: int, batch: int) -> list[int]:
        """The windows of a step, in order."""
        samples = range(step * batch, (step + 1) * batch)
        return [self._shuffled(seed, i // len(self), len(self))[i % len(self)] for i in samples]

    def streams(self, seed: int, step: int, batch: int) -> tuple[list[int], list[bool]]:
        """The windows of a step where each row of the batch goes on with the next window of the data, for STRETCH
        windows, then at another place; and which rows are at such a place. The stretches of an epoch are in random
        order, as windows are in `indices`, and the rows begin theirs at different steps. A small batch sees fewer parts
        of the data so."""
        stretches = -(-len(self) // STRETCH)
        windows, anew = [], []
        for row in range(batch):
            visit, place = divmod(step + row * STRETCH // batch, STRETCH)
            epoch, number = divmod(visit * batch + row, stretches)
            stretch = int(self._shuffled(seed, epoch, stretches)[number])
            windows.append((stretch * STRETCH + place) % len(self))
            anew.append(place == 0 or step == 0)
        return windows, anew

    def begins_document(self, index: int) -> bool:
        """Whether a window's first token is the first of a document at which the state restarts, or of the data."""
        start = index * self.length
        found = np.searchsorted(self.tokens.starts, start)
        return index == 0 or bool(self.reset and found < len(self.tokens.starts) and self.tokens.starts[found] == start)

    def _shuffled(self, seed: int, epoch: int, count: int) -> np.ndarray:
        if self._permutation is None or self._permutation[0] != (seed, epoch, count):
            # the order is that of rng.permutation(count), which takes twice the memory
            numbers = np.arange(count, dtype=np.uint32 if count < 2**32 else np.uint64)
            np.random.default_rng([seed, epoch]).shuffle(numbers)
            self._permutation = (seed, epoch, count), numbers
        return self._permutation[1]

    def batch(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Inputs (k, T) int64, targets (k, T) int64 with -100 where an id does not count, and seq_idx (k, T) int32.

        seq_idx is None if no document begins inside a window, because kernels are faster without it."""
        T = self.length
        window = np.full((len(indices), T + 1), self.tokens.eot_id, dtype=np.int64)
        seq_idx = np.zeros((len(indices), T), dtype=np.int32)
        counted = np.zeros((len(indices), T), dtype=bool)
        for row, index in enumerate(indices):
            start = int(index) * T
            ids = self.tokens.ids[start : start + T + 1]
            window[row, : len(ids)] = ids
            counts = self.tokens.counted
            counted[row, : len(ids) - 1] = True if counts is None else counts[start + 1 : start + T + 1]
            if self.reset:
                # search the starts of all documents, perhaps a large file, only for the ends of the window
                first, last = np.searchsorted(self.tokens.starts, [start, start + T - 1], side="right")
                inside = self.tokens.starts[first:last]
                seq_idx[row] = first + np.searchsorted(inside, np.arange(start, start + T), side="right")
        window = torch.from_numpy(window)
        targets = window[:, 1:].masked_fill(~torch.from_numpy(counted), IGNORE_INDEX)
        parted = (seq_idx != seq_idx[:, :1]).any()
        return window[:, :-1], targets, torch.from_numpy(seq_idx) if parted else None
