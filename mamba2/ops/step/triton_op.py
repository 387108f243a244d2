"""The Triton backend of `ssd_step`: one launch, the same compiled kernel for every step."""

import torch
import triton

from mamba2.ops.step.triton_kernel import _step_kernel
from mamba2.ops.triton_launch import require_kernel_tensors

# Elements of the state that one program holds: 16 registers of each of its threads.
ELEMENTS, WARPS = 2048, 4


def ssd_step_triton(
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
    require_kernel_tensors(x=x, state=state, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    if D is not None and D.dim() == 1:
        D = D[:, None].expand(-1, x.shape[2])
    return _ssd_step_op(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, *map(float, dt_limit))


@torch.library.custom_op("mamba2::ssd_step", mutates_args=("state",))
def _ssd_step_op(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
) -> torch.Tensor:
    b, h, p = x.shape
    g, n = B.shape[1:]
    y = x.new_empty(b, h, p)
    columns = triton.next_power_of_2(n)
    tile = max(1, min(triton.next_power_of_2(p), ELEMENTS // columns))
    with torch.cuda.device_of(x):
        _step_kernel[(h * triton.cdiv(p, tile), b)](
            state,
            x,
            dt,
            A,
            B,
            C,
            D,
            z,
            dt_bias,
            y,
            state.stride(),
            x.stride(),
            dt.stride(),
            A.stride(0),
            B.stride(),
            C.stride(),
            (0, 0) if D is None else D.stride(),
            (0, 0, 0) if z is None else z.stride(),
            0 if dt_bias is None else dt_bias.stride(0),
            low,
            high,
            h=h,
            p=p,
            n=n,
            HEADS_PER_GROUP=h // g,
            SOFTPLUS=dt_softplus,
            P_TILE=tile,
            N_TILE=columns,
            num_warps=WARPS,
        )
    return y


@_ssd_step_op.register_fake
def _(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, low, high):
    return x.new_empty(x.shape)
