"""Mamba-2 in PyTorch and Triton: the state-space duality layer, its language model, and the study of dt_bias."""

from mamba2.config import Mamba2Config
from mamba2.model import Mamba2LM

__all__ = ["Mamba2Config", "Mamba2LM"]
