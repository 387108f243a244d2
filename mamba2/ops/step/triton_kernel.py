"""One token of SSD, the state updated where it lies.

    dt = clamp(softplus(dt_raw + bias), low, high)        h' = exp(dt A) h + dt x ⊗ B        y = h' C + D x, · silu(z)

Each element of the state is read once and written once, and nothing else is worth counting: per sequence 8 h p n bytes
for a float32 state, beside 2 (3 h p + h + 2 g n) for 16-bit x, z, y, dt, B and C. B and C are shared by the heads of a
group, whose programs run side by side.
"""

import triton
import triton.language as tl

from mamba2.ops.triton_math import LOG2E, silu, softplus


@triton.jit
def _step_kernel(
    state,  # in and out: (b, h, p, n)
    x,  # (b, h, p)
    dt,  # (b, h)
    A,  # (h)
    B,  # (b, g, n)
    C,  # (b, g, n)
    D,  # (h, p) or None
    z,  # (b, h, p) or None
    bias,  # (h) or None
    y,  # out: (b, h, p), contiguous
    state_strides,
    x_strides,
    dt_strides,
    A_stride,
    B_strides,
    C_strides,
    D_strides,
    z_strides,
    bias_stride,
    low,
    high,
    h: tl.constexpr,
    p: tl.constexpr,
    n: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    P_TILE: tl.constexpr,
    N_TILE: tl.constexpr,
):
    """Grid (h * p tiles, b). A program owns P_TILE channels of one head with all of their state."""
    p_tiles: tl.constexpr = (p + P_TILE - 1) // P_TILE
    head = (tl.program_id(0) // p_tiles).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    group = head // HEADS_PER_GROUP
    channels = tl.program_id(0) % p_tiles * P_TILE + tl.arange(0, P_TILE)
    columns = tl.arange(0, N_TILE)
    real, inside = channels < p, columns < n

    step = tl.load(dt + batch * dt_strides[0] + head * dt_strides[1]).to(tl.float32)
    if bias is not None:
        step += tl.load(bias + head * bias_stride).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    step = tl.minimum(tl.maximum(step, low), high)
    decay = tl.exp2(step * tl.load(A + head * A_stride).to(tl.float32) * LOG2E)

    x += batch * x_strides[0] + head * x_strides[1] + channels * x_strides[2]
    x_p = tl.load(x, mask=real, other=0.0).to(tl.float32)
    B += batch * B_strides[0] + group * B_strides[1] + columns * B_strides[2]
    C += batch * C_strides[0] + group * C_strides[1] + columns * C_strides[2]
    B_n = tl.load(B, mask=inside, other=0.0).to(tl.float32)
    C_n = tl.load(C, mask=inside, other=0.0).to(tl.float32)

    state += batch * state_strides[0] + head * state_strides[1]
    state += channels[:, None] * state_strides[2] + columns[None, :] * state_strides[3]
    mask = real[:, None] & inside[None, :]
    new = decay * tl.load(state, mask=mask, other=0.0).to(tl.float32) + (step * x_p)[:, None] * B_n[None, :]
    tl.store(state, new.to(state.dtype.element_ty), mask=mask)

    y_p = tl.sum(new * C_n[None, :], axis=1)
    if D is not None:
        D += head * D_strides[0] + channels * D_strides[1]
        y_p += tl.load(D, mask=real, other=0.0).to(tl.float32) * x_p
    if z is not None:
        z += batch * z_strides[0] + head * z_strides[1] + channels * z_strides[2]
        y_p *= silu(tl.load(z, mask=real, other=0.0).to(tl.float32))
    tl.store(y + (batch * h + head) * p + channels, y_p.to(y.dtype.element_ty), mask=real)
