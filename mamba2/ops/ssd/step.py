"""One token of `ssd`, for decoding: the state is updated in place.

    step = clamp(softplus(dt + bias), low, high)      h' = exp(step A) h + step x ⊗ B      y = (h' C + D x) · silu(z)

Time and memory do not depend on how many tokens came before. No gradients: train with `ssd`. Each element of the state
is read once and written once, which is nearly all of the memory traffic: per sequence 8 h p n bytes for a float32
state, and 2 (3 h p + h + 2 g n) for 16-bit x, z, y, dt, B and C. The heads of a group, neighbours in the grid, share B
and C.
"""

import math

import torch

from mamba2.ops.backend import choose_backend
from mamba2.ops.kernel import LOG2E, constant, require_kernel_tensors, silu, softplus
from mamba2.ops.language import tl, triton
from mamba2.ops.ssd.decay import Activation
from mamba2.ops.ssd.reference import ssd_step_reference
from mamba2.ops.ssd.tiles import Sizes, view

# Elements of the state that one program holds: 16 registers of each of its threads.
ELEMENTS, WARPS = 2048, 4


@torch.no_grad()
def ssd_step(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> torch.Tensor:
    """Advance `state` in place by one token and return y: (b, h, p) in x's dtype.

    Arguments (b batch, h nheads, p headdim, g ngroups, n d_state; any strides):
        state: (b, h, p, n) float32 or wider, as `ssd` returns it.
        x: (b, h, p); dt: (b, h) before bias and activation; B, C: (b, g, n).
        A, D, z, dt_bias, dt_softplus, dt_limit: as in `mamba2.ops.ssd`, z being (b, h, p).

    Raises ValueError naming the argument whose shape does not fit, or dtype where the backend is Triton.
    """
    if x.dim() != 3 or 0 in x.shape or B.dim() != 3 or 0 in B.shape:
        raise ValueError(f"x must be (batch, nheads, headdim) and B (batch, ngroups, d_state), not {_shapes(x, B)}")
    b, h, p = x.shape
    g, n = B.shape[1:]
    if h % g:
        raise ValueError(f"the {h} heads of x cannot be divided among the {g} groups of B")
    wanted = {
        "state": (state, (b, h, p, n)),
        "dt": (dt, (b, h)),
        "A": (A, (h,)),
        "B": (B, (b, g, n)),
        "C": (C, (b, g, n)),
        "z": (z, (b, h, p)),
        "dt_bias": (dt_bias, (h,)),
        "D": (D, (h, p) if D is not None and D.dim() == 2 else (h,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")
    implementation = IMPLEMENTATIONS[choose_backend(x, tuple(IMPLEMENTATIONS))]
    with torch.autocast(x.device.type, enabled=False):
        return implementation(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit)


def _shapes(*tensors: torch.Tensor) -> str:
    return " and ".join(str(tuple(t.shape)) for t in tensors)


@triton.jit
def _step_kernel(
    state,  # View (b, h, p, n), in and out
    x,  # View (b, h, p)
    activation,
    B,  # View (b, g, n)
    C,  # View (b, g, n)
    D,  # View (h, p) or None
    z,  # View (b, h, p) or None
    y,  # out: (b, h, p), contiguous
    Z: tl.constexpr,
):
    """Grid (h * p tiles, b). A program owns P channels of one head with all of their state."""
    p_tiles: tl.constexpr = (Z.p + Z.P - 1) // Z.P
    head = (tl.program_id(0) // p_tiles).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    group = head // Z.R
    channels = tl.program_id(0) % p_tiles * Z.P + tl.arange(0, Z.P)
    columns = tl.arange(0, Z.N1)
    real, inside = channels < Z.p, columns < Z.n

    step = tl.load(activation.dt.pointer + batch * activation.dt.batch + head * activation.dt.strides[0]).to(tl.float32)
    if activation.bias is not None:
        step += tl.load(activation.bias + head).to(tl.float32)
    if activation.SOFTPLUS:
        step = softplus(step)
    step = tl.minimum(tl.maximum(step, activation.low), activation.high)
    decay = tl.exp2(step * tl.load(activation.A + head).to(tl.float32) * LOG2E)

    x_p = tl.load(_row(x, batch, head) + channels * x.strides[1], mask=real, other=0.0).to(tl.float32)
    B_n = tl.load(_row(B, batch, group) + columns * B.strides[1], mask=inside, other=0.0).to(tl.float32)
    C_n = tl.load(_row(C, batch, group) + columns * C.strides[1], mask=inside, other=0.0).to(tl.float32)
    place = _row(state, batch, head) + channels[:, None] * state.strides[1] + columns[None, :] * state.strides[2]
    mask = real[:, None] & inside[None, :]
    new = decay * tl.load(place, mask=mask, other=0.0).to(tl.float32) + (step * x_p)[:, None] * B_n[None, :]
    tl.store(place, new.to(state.pointer.dtype.element_ty), mask=mask)

    y_p = tl.sum(new * C_n[None, :], axis=1)
    if D is not None:
        D_p = tl.load(D.pointer + head * D.batch + channels * D.strides[0], mask=real, other=0.0)
        y_p += D_p.to(tl.float32) * x_p
    if z is not None:
        y_p *= silu(tl.load(_row(z, batch, head) + channels * z.strides[1], mask=real, other=0.0).to(tl.float32))
    tl.store(y + (batch * Z.h + head) * Z.p + channels, y_p.to(y.dtype.element_ty), mask=real)


@triton.jit
def _row(v, batch, head):
    return v.pointer + batch * v.batch + head * v.strides[0]


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
    """One launch, the same compiled kernel for every step."""
    b, h, p = x.shape
    g, n = B.shape[1:]
    y = x.new_empty(b, h, p)
    columns = triton.next_power_of_2(n)
    tile = max(1, min(triton.next_power_of_2(p), ELEMENTS // columns))
    bias = None if dt_bias is None else dt_bias.contiguous()
    activation = Activation(view(dt), A.contiguous(), bias, low, high, constant(dt_softplus))
    sizes = Sizes(h, p, n, h // g, 1, tile, columns, 0, "ieee")
    with torch.cuda.device_of(x):
        _step_kernel[(h * triton.cdiv(p, tile), b)](
            view(state), view(x), activation, view(B), view(C), view(D), view(z), y, sizes, num_warps=WARPS
        )
    return y


@_ssd_step_op.register_fake
def _(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, low, high):
    return x.new_empty(x.shape)


def ssd_step_triton(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit) -> torch.Tensor:
    require_kernel_tensors(x=x, state=state, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    if D is not None and D.dim() == 1:
        D = D[:, None].expand(-1, x.shape[2])
    return _ssd_step_op(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, *map(float, dt_limit))


# The torch backend runs the reference form; `mamba2.decoding` has faster ones for a model.
IMPLEMENTATIONS = {"reference": ssd_step_reference, "torch": ssd_step_reference, "triton": ssd_step_triton}
