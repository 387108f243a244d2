"""Root-mean-square norms (Zhang & Sennrich 2019, arXiv:1910.07467): of the residual stream, and gated inside the mixer.

rms(x) = sqrt(mean(x²) + eps)
add_rms_norm:    residual' = residual + x,        y = weight · residual' / rms(residual')
gated_rms_norm:  u = x · silu(z) per group,       y = weight · u / rms(u)        (the gate before the norm)
                 or                               y = weight · x / rms(x) · silu(z)
"""

import torch

from mamba2.ops.backend import choose_backend
from mamba2.ops.norm.blocked import add_rms_norm_blocked, gated_rms_norm_blocked
from mamba2.ops.norm.reference import add_rms_norm_reference, gated_rms_norm_reference
from mamba2.ops.norm.triton_op import add_rms_norm_triton, gated_rms_norm_triton

ADD_IMPLEMENTATIONS = {
    "reference": add_rms_norm_reference,
    "torch": add_rms_norm_blocked,
    "triton": add_rms_norm_triton,
}
GATED_IMPLEMENTATIONS = {
    "reference": gated_rms_norm_reference,
    "torch": gated_rms_norm_blocked,
    "triton": gated_rms_norm_triton,
}


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a block's output to the residual stream and normalise the sum, in float32.

    Arguments:
        x: (..., d) output of the block before, or the embeddings; any float dtype.
        residual: (..., d) the stream so far, or None at the start. Its dtype is the stream's; None starts it in x's.
        weight: (d,).
        eps: added to the mean square.
        dtype: of the normalised result; x's if None.

    Returns (normalised (..., d) in `dtype`, residual + x (..., d) in the stream's dtype).
    Raises ValueError naming the argument whose shape does not fit, or dtype where the backend is Triton.
    """
    if tuple(weight.shape) != x.shape[-1:]:
        raise ValueError(f"weight must have shape ({x.shape[-1]},), not {tuple(weight.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {tuple(x.shape)}, not {tuple(residual.shape)}")
    implementation = ADD_IMPLEMENTATIONS[choose_backend(x, tuple(ADD_IMPLEMENTATIONS))]
    return implementation(x, residual, weight, eps, x.dtype if dtype is None else dtype)


def gated_rms_norm(
    x: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    ngroups: int = 1,
    norm_before_gate: bool = False,
) -> torch.Tensor:
    """Gate by silu(z) and normalise each of `ngroups` equal slices of the channels by itself, in float32.

    Arguments:
        x, z: (..., d), any float dtype.
        weight: (d,).
        eps: added to the mean square.
        ngroups: slices of d / ngroups channels, each with its own mean square.
        norm_before_gate: normalise first, then gate.

    Returns (..., d) in x's dtype. The meaning is that of mamba-ssm's `RMSNormGated` with group_size = d / ngroups.
    Raises ValueError naming the argument that does not fit.
    """
    d = x.shape[-1]
    if z.shape != x.shape:
        raise ValueError(f"z must have the shape of x, {tuple(x.shape)}, not {tuple(z.shape)}")
    if tuple(weight.shape) != (d,):
        raise ValueError(f"weight must have shape ({d},), not {tuple(weight.shape)}")
    if ngroups < 1 or d % ngroups != 0:
        raise ValueError(f"ngroups must divide the {d} channels, not {ngroups}")
    implementation = GATED_IMPLEMENTATIONS[choose_backend(x, tuple(GATED_IMPLEMENTATIONS))]
    return implementation(x, z, weight, eps, ngroups, norm_before_gate)
