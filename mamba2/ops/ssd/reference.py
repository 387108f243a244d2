"""SSD as the recurrence it is, one token after the other: slow, plain, exact in float64. The oracle of the tests."""

import torch
import torch.nn.functional as F


def ssd_reference(
    x: torch.Tensor,  # (b, l, h, p)
    dt: torch.Tensor,  # (b, l, h)
    A: torch.Tensor,  # (h,)
    B: torch.Tensor,  # (b, l, g, n)
    C: torch.Tensor,  # (b, l, g, n)
    chunk_size: int,
    D: torch.Tensor | None,  # (h,) or (h, p)
    z: torch.Tensor | None,  # (b, l, h, p)
    dt_bias: torch.Tensor | None,  # (h,)
    initial_states: torch.Tensor | None,  # (b, h, p, n)
    seq_idx: torch.Tensor | None,  # (b, l)
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    return_final_states: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `mamba2.ops.ssd`; `chunk_size` has no meaning here. Returns y (b, l, h, p), last state if asked for."""
    batch, seqlen, nheads, headdim = x.shape
    heads_per_group = nheads // B.shape[2]
    result_dtype = x.dtype
    dtype = torch.promote_types(x.dtype, torch.float32)
    dt = activate_dt(dt, dt_bias, dt_softplus, dt_limit, dtype)  # (b, l, h)
    x, A = x.to(dtype), A.to(dtype)
    B = B.to(dtype).repeat_interleave(heads_per_group, dim=2)  # (b, l, h, n)
    C = C.to(dtype).repeat_interleave(heads_per_group, dim=2)  # (b, l, h, n)
    if initial_states is None:
        state = x.new_zeros(batch, nheads, headdim, B.shape[-1])
    else:
        state = initial_states.to(dtype)

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

    if D is not None:
        y = y + x * (D if D.dim() == 2 else D[:, None]).to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(result_dtype), state if return_final_states else None


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
