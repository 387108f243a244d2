"""Both norms in plain torch, computed in float32 (float64 for float64 input)."""

import torch
import torch.nn.functional as F


def add_rms_norm_reference(
    x: torch.Tensor,  # (..., d)
    residual: torch.Tensor | None,  # (..., d)
    weight: torch.Tensor,  # (d,)
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mamba2.ops.add_rms_norm`."""
    residual = x if residual is None else residual + x.to(residual.dtype)
    wide = residual.to(torch.promote_types(residual.dtype, torch.float32))
    return (_rms_normalise(wide, eps) * weight.to(wide.dtype)).to(dtype), residual


def gated_rms_norm_reference(
    x: torch.Tensor,  # (..., d)
    z: torch.Tensor,  # (..., d)
    weight: torch.Tensor,  # (d,)
    eps: float,
    ngroups: int,
    norm_before_gate: bool,
) -> torch.Tensor:
    """See `mamba2.ops.gated_rms_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    gate = F.silu(z.to(wide))
    u = x.to(wide) if norm_before_gate else x.to(wide) * gate
    y = _rms_normalise(u.unflatten(-1, (ngroups, -1)), eps).flatten(-2) * weight.to(wide)
    return (y * gate if norm_before_gate else y).to(x.dtype)


def _rms_normalise(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
