"""What the SSD kernels share: loads, the activation of dt, decays, one step of the state. Each is written once, here.

Names: q tokens per step (constant Q), p headdim, n d_state. The n dimension is held as two tiles, of N1 and N2
columns, so that d_state 142 costs 128 + 16 and not 256; N2 is 0 where one tile covers it, and second tiles are then
never touched. Exponentials are base 2: decay rates arrive multiplied by log2(e), and `cs` below is in that unit.

Overflow: pointers move by int64 offsets from one step to the next; inside a tile offsets are int32, unless the launcher
found that one could pass 2**31 and set WIDE.
"""

import triton
import triton.language as tl

from mamba2.ops.triton_math import LOG2E, silu


@triton.jit
def tile_rows(Q: tl.constexpr, WIDE: tl.constexpr):
    """Token numbers inside a step, (Q)."""
    rows = tl.arange(0, Q)
    return rows.to(tl.int64) if WIDE else rows


@triton.jit
def load_tile(pointer, rows, left, columns, width, row_stride, column_stride):
    """(rows, columns) of a matrix with `left` rows and `width` columns; zero outside."""
    mask = (rows[:, None] < left) & (columns[None, :] < width)
    return tl.load(pointer + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=mask, other=0.0)


@triton.jit
def store_tile(pointer, rows, left, columns, width, row_stride, value):
    """The counterpart of `load_tile`, for rows of contiguous columns."""
    mask = (rows[:, None] < left) & (columns[None, :] < width)
    tl.store(pointer + rows[:, None] * row_stride + columns[None, :], value, mask=mask)


@triton.jit
def gated(value, gate):
    """value * silu(gate), in value's dtype."""
    return (value.to(tl.float32) * silu(gate.to(tl.float32))).to(value.dtype)


@triton.jit
def softplus(raw):
    """log(1 + exp(raw)) to within float32's rounding.

    Near raw = -7, where steps of 1e-3 come from, 1 + exp(raw) has lost half of exp(raw)'s digits. Up to exp(raw) =
    1/4 the series 2 atanh(s), s = e / (2 + e), is used: its first omitted term is below 1e-9 of the result.
    """
    e = tl.exp2(tl.minimum(raw, 20.0) * LOG2E)
    s = e / (2.0 + e)
    s2 = s * s
    series = 2.0 * s * (1.0 + s2 * (1.0 / 3.0 + s2 * (1.0 / 5.0 + s2 * (1.0 / 7.0 + s2 * (1.0 / 9.0)))))
    direct = tl.log(1.0 + e)
    return tl.where(raw > 20.0, raw, tl.where(e < 0.25, series, direct))


@triton.jit
def load_dt(dt, stride, rows, left, bias, head, SOFTPLUS: tl.constexpr):
    """dt before and after softplus, (Q), float32; `bias` is a pointer or None."""
    raw = tl.load(dt + rows * stride, mask=rows < left, other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + head).to(tl.float32)
    if SOFTPLUS:
        return raw, softplus(raw)
    else:
        return raw, raw


@triton.jit
def clamp_dt(dt, rows, left, low, high):
    """The step used: within the limits, and 0 past the end, so that the state neither decays nor is written there."""
    clamped = tl.where(dt < low, low, tl.where(dt > high, high, dt))  # a NaN stays one
    return tl.where(rows < left, clamped, 0.0)


@triton.jit
def documents(seq_idx, stride, rows, start, left):
    """Number of changes of `seq_idx` from the token before the step up to each token, (Q); 0 without `seq_idx`."""
    if seq_idx is not None:
        here = tl.load(seq_idx + rows * stride, mask=rows < left, other=0)
        before_mask = (rows < left) & (rows + start > 0)
        before = tl.load(seq_idx + (rows - 1) * stride, mask=before_mask, other=0)
        return tl.cumsum((before_mask & (here != before)).to(tl.int32), axis=0)
    else:
        return tl.zeros_like(rows).to(tl.int32)


@triton.jit
def decays(cs, document, rows, HAS_DOCUMENTS: tl.constexpr):
    """Factors of a step: state before it -> token i; token j -> state after it; state before -> state after.

    A document boundary is an infinite decay, made by `where` and never by a product: nothing is ever inf * 0.
    """
    # The last entry itself: another way to sum would round otherwise, and the last token's factor would not be 1.
    last = tl.sum(tl.where(rows == rows.shape[0] - 1, cs, 0.0), axis=0)
    into = tl.exp2(cs)
    out = tl.exp2(tl.minimum(last - cs, 0.0))
    through = tl.exp2(last)
    if HAS_DOCUMENTS:
        final = tl.max(document, axis=0)
        into = tl.where(document == 0, into, 0.0)
        out = tl.where(document == final, out, 0.0)
        through = tl.where(final == 0, through, 0.0)
    return into, out, through


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc in float32. PRECISION says how float32 operands are multiplied; 16-bit ones are exact."""
    return tl.dot(a, b, acc=acc, input_precision=PRECISION)


@triton.jit
def load_state(pointer, columns, p: tl.constexpr, n: tl.constexpr, FIRST: tl.constexpr, N: tl.constexpr):
    """Rows FIRST to FIRST + N of a state kept as (n, p), contiguous; (N, P_TILE)."""
    rows = FIRST + tl.arange(0, N)
    return load_tile(pointer, rows, n, columns, p, p, 1)


@triton.jit
def keep_state(pointer, state, columns, p: tl.constexpr, n, FIRST: tl.constexpr, N: tl.constexpr):
    """Keep rows FIRST to FIRST + N of a state as (n, p); nothing at all with n = 0."""
    store_tile(pointer, FIRST + tl.arange(0, N), n, columns, p, p, state.to(pointer.dtype.element_ty))


@triton.jit
def load_given_state(pointer, strides, columns, p: tl.constexpr, n: tl.constexpr, FIRST: tl.constexpr, N: tl.constexpr):
    """Rows FIRST to FIRST + N of a caller's (b, h, p, n) state as (N, P_TILE), float32."""
    rows = FIRST + tl.arange(0, N)
    mask = (rows[:, None] < n) & (columns[None, :] < p)
    offsets = rows.to(tl.int64)[:, None] * strides[3] + columns.to(tl.int64)[None, :] * strides[2]
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_given_state(pointer, state, columns, p: tl.constexpr, n: tl.constexpr, FIRST: tl.constexpr, N: tl.constexpr):
    """Write rows FIRST to FIRST + N of a state into a contiguous (p, n) matrix."""
    rows = FIRST + tl.arange(0, N)
    mask = (rows[:, None] < n) & (columns[None, :] < p)
    tl.store(pointer + columns[None, :] * n + rows[:, None], state.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def advance_with(state1, state2, value, weight, through, k1, k2, N2: tl.constexpr, PRECISION: tl.constexpr):
    """through * state + Σ_j weight_j k_j value_jᵀ, for both tiles of the state."""
    weighted = (value.to(tl.float32) * weight[:, None]).to(value.dtype)
    state1 = dot(tl.trans(k1), weighted, state1 * through, PRECISION)
    if N2 > 0:
        state2 = dot(tl.trans(k2), weighted, state2 * through, PRECISION)
    return state1, state2


@triton.jit
def advance(
    state1,  # (N1, P_TILE), float32
    state2,  # (N2, P_TILE), float32; anything where N2 is 0
    v,  # pointers to the step's first token, for the head: x, or dout when REVERSE
    v_strides,
    z,  # gate of dout, or None
    z_strides,
    k,  # B, or C when REVERSE
    k_strides,
    dt,
    dt_stride,
    seq_idx,  # pointer or None
    seq_stride,
    bias,
    head,
    rate,  # A log2(e)
    start,
    left,  # tokens from the step's first to the end of the sequence
    columns,  # (P_TILE)
    low,
    high,
    p: tl.constexpr,
    n: tl.constexpr,
    Q: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One step of the state, or in REVERSE of its gradient; also returns the decay through the step.

    forward   S' = through S + sum_j out_j dt_j B_j x_jᵀ          reverse   R' = through R + sum_i into_i C_i dout_iᵀ
    """
    rows = tile_rows(Q, WIDE)
    _, activated = load_dt(dt, dt_stride, rows, left, bias, head, SOFTPLUS)
    step = clamp_dt(activated, rows, left, low, high)
    document = documents(seq_idx, seq_stride, rows, start, left)
    cs = tl.cumsum(step * rate, axis=0)
    into, out, through = decays(cs, document, rows, seq_idx is not None)
    value = load_tile(v, rows, left, columns, p, v_strides[1], v_strides[3])
    weight = into if REVERSE else out * step
    if z is not None:
        gate = load_tile(z, rows, left, columns, p, z_strides[1], z_strides[3])
        value = gated(value, gate)
    k1 = load_tile(k, rows, left, tl.arange(0, N1), n, k_strides[1], k_strides[3])
    k2 = k1
    if N2 > 0:
        k2 = load_tile(k, rows, left, N1 + tl.arange(0, N2), n, k_strides[1], k_strides[3])
    state1, state2 = advance_with(state1, state2, value, weight, through, k1, k2, N2, PRECISION)
    return state1, state2, through
