"""The mathematics: each op is one public function and one file per backend. Knows tensors only."""

from mamba2.ops.ssd import ssd

__all__ = ["ssd"]
