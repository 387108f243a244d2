"""The operations, functions of tensors. All but `causal_conv1d_step` have a reference, a torch and a Triton form."""

from mamba2.ops.conv1d import causal_conv1d, causal_conv1d_step
from mamba2.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy, linear_token_losses
from mamba2.ops.norm import add_rms_norm, gated_rms_norm
from mamba2.ops.ssd import ssd
from mamba2.ops.ssd.step import ssd_step

__all__ = [
    "IGNORE_INDEX",
    "add_rms_norm",
    "causal_conv1d",
    "causal_conv1d_step",
    "gated_rms_norm",
    "linear_cross_entropy",
    "linear_token_losses",
    "ssd",
    "ssd_step",
]
