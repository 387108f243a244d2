"""One token in plain torch, computed in float32 (float64 for float64 input)."""

import torch
import torch.nn.functional as F

from mamba2.ops.ssd.reference import activate_dt


def ssd_step_reference(
    state: torch.Tensor,  # (b, h, p, n)
    x: torch.Tensor,  # (b, h, p)
    dt: torch.Tensor,  # (b, h)
    A: torch.Tensor,  # (h,)
    B: torch.Tensor,  # (b, g, n)
    C: torch.Tensor,  # (b, g, n)
    D: torch.Tensor | None,  # (h,) or (h, p)
    z: torch.Tensor | None,  # (b, h, p)
    dt_bias: torch.Tensor | None,  # (h,)
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> torch.Tensor:
    """See `mamba2.ops.ssd_step`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    repeats = x.shape[1] // B.shape[1]
    dt = activate_dt(dt, dt_bias, dt_softplus, dt_limit, wide)  # (b, h)
    B, C = (t.to(wide).repeat_interleave(repeats, dim=1) for t in (B, C))  # (b, h, n)
    dtx = dt[..., None] * x.to(wide)  # (b, h, p)
    state.mul_(torch.exp(dt * A.to(wide))[..., None, None]).add_(dtx[..., None] * B[:, :, None])
    y = (state * C[:, :, None]).sum(-1)  # (b, h, p)
    if D is not None:
        y = y + x * (D if D.dim() == 2 else D[:, None]).to(wide)
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(x.dtype)


def causal_conv1d_step_reference(
    window: torch.Tensor,  # (b, K - 1, d)
    x: torch.Tensor,  # (b, d)
    weight: torch.Tensor,  # (d, K)
    bias: torch.Tensor | None,  # (d,)
    activation: bool,
) -> torch.Tensor:
    """See `mamba2.ops.causal_conv1d_step`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    inputs = torch.cat([window.to(x.dtype), x[:, None]], dim=1)  # (b, K, d)
    window.copy_(inputs[:, 1:])
    y = (inputs.to(wide) * weight.t().to(wide)).sum(dim=1)
    if bias is not None:
        y = y + bias.to(wide)
    return (F.silu(y) if activation else y).to(x.dtype)
