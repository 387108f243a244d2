"""SSD as a recurrence, token by token, and one step of it for decoding: slow and simple, the tests' reference."""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class SSDInputs(NamedTuple):
    """The checked arguments of `mamba2.ops.ssd`, in its order."""

    x: torch.Tensor  # (b, l, h, p)
    dt: torch.Tensor  # (b, l, h)
    A: torch.Tensor  # (h,)
    B: torch.Tensor  # (b, l, g, n)
    C: torch.Tensor  # (b, l, g, n)
    chunk_size: int
    D: torch.Tensor | None  # (h,) or (h, p)
    z: torch.Tensor | None  # (b, l, h, p)
    dt_bias: torch.Tensor | None  # (h,)
    initial_states: torch.Tensor | None  # (b, h, p, n)
    seq_idx: torch.Tensor | None  # (b, l)
    dt_softplus: bool
    dt_limit: tuple[float, float]
    return_final_states: bool


def ssd_reference(inputs: SSDInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `mamba2.ops.ssd`; `chunk_size` has no meaning here. Returns y (b, l, h, p), last state if asked for."""
    x, seq_idx = inputs.x, inputs.seq_idx
    batch, seqlen, nheads, headdim = x.shape
    heads_per_group = nheads // inputs.B.shape[2]
    dtype = torch.promote_types(x.dtype, torch.float32)
    dt = activate_dt(inputs.dt, inputs.dt_bias, inputs.dt_softplus, inputs.dt_limit, dtype)  # (b, l, h)
    x, A = x.to(dtype), inputs.A.to(dtype)
    B = inputs.B.to(dtype).repeat_interleave(heads_per_group, dim=2)  # (b, l, h, n)
    C = inputs.C.to(dtype).repeat_interleave(heads_per_group, dim=2)  # (b, l, h, n)
    if inputs.initial_states is None:
        state = x.new_zeros(batch, nheads, headdim, B.shape[-1])
    else:
        state = inputs.initial_states.to(dtype)

    outputs = []
    for t in range(seqlen):
        if seq_idx is not None and t > 0:
            same_document = (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
            state = torch.where(same_document, state, torch.zeros_like(state))
        decay = torch.exp(dt[:, t] * A)[:, :, None, None]  # (b, h, 1, 1)
        write = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        state = decay * state + write  # (b, h, p, n)
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    y = torch.stack(outputs, dim=1)  # (b, l, h, p)

    y = skip_and_gate(y, x, inputs.D, inputs.z)
    return y.to(inputs.x.dtype), state if inputs.return_final_states else None


def skip_and_gate(y: torch.Tensor, x: torch.Tensor, D: torch.Tensor | None, z: torch.Tensor | None) -> torch.Tensor:
    """(y + D x) · silu(z), (..., h, p), in the dtype of y."""
    if D is not None:
        y = y + x * (D if D.dim() == 2 else D[:, None]).to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y


def activate_dt(
    dt: torch.Tensor,  # (b, l, h)
    dt_bias: torch.Tensor | None,  # (h,)
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The step of each head, clamp(softplus(dt + dt_bias), *dt_limit), (b, l, h) in `dtype`."""
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    return dt.clamp(*dt_limit)


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
    return skip_and_gate(y, x, D, z).to(x.dtype)
