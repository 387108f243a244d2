"""What the SSD kernels share: arguments, loads, the activation of dt, decays, a step of the state. Each written once.

Names: q tokens per step, p headdim, n d_state. The n dimension is held as two tiles of n1 and n2 columns, so that
d_state 142 costs 128 + 16 and not 256; n2 is 0 where one tile covers it, and second tiles are then never touched: an
alias of the first stands in their place. Exponentials are base 2: decay rates carry a factor log2(e), and `cs` is in
that unit.

Offsets are int64 throughout. The strides inside a tile are compile-time constants: with them the addresses of a tile
are one register and immediate offsets, where runtime strides cost a register or two for every row.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


class Tokens(NamedTuple):
    """A tensor (b, l, heads or groups, columns) and its strides."""

    data: object
    batch: object
    token: object  # constant
    head: object
    column: object  # constant
    align: object  # constant: a power of two that divides the stride `head`, so that loads can be wide


class Clock(NamedTuple):
    """What decides the steps of a head and its decays."""

    dt: Tokens
    A: object  # (h)
    bias: object  # (h) or None
    seq_idx: object  # Tokens with one head, or None
    low: object
    high: object


class PerChannel(NamedTuple):
    """D and its strides over heads and channels; the latter is 0 where a head has one value."""

    data: object
    head: object
    column: object


class Given(NamedTuple):
    """A caller's states (b, h, p, n) and their strides."""

    data: object
    batch: object
    head: object
    p: object
    n: object


class Sizes(NamedTuple):
    """Compile-time constants of the three large kernels."""

    p: tl.constexpr
    n: tl.constexpr
    heads_per_group: tl.constexpr
    q: tl.constexpr  # tokens per step
    span: tl.constexpr  # steps between kept states
    p_tile: tl.constexpr  # channels of a head that a program holds
    n1: tl.constexpr
    n2: tl.constexpr
    softplus: tl.constexpr
    precision: tl.constexpr  # of products of float32 operands


@triton.jit
def at(x, batch, head):
    """`x` from one batch entry and head (or group) on."""
    offset = batch * x.batch + tl.multiple_of(head * x.head, x.align)
    return Tokens(x.data + offset, x.batch, x.token, x.head, x.column, x.align)


@triton.jit
def at_batch(clock, batch):
    seq_idx = at(clock.seq_idx, batch, 0) if clock.seq_idx is not None else None
    return Clock(at(clock.dt, batch, 0), clock.A, clock.bias, seq_idx, clock.low, clock.high)


@triton.jit
def load_tile(x, start, seqlen, columns, width: tl.constexpr, q: tl.constexpr):
    """Tokens start to start + q of one head, (q, columns); zero past the end and past `width`."""
    rows = tl.arange(0, q).to(tl.int64)
    mask = (rows[:, None] < seqlen - start) & (columns[None, :] < width)
    pointers = x.data + start * x.token + rows[:, None] * x.token + columns[None, :] * x.column
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_n(x, start, seqlen, s):
    """B or C for a step: (q, n1) and (q, n2)."""
    first = load_tile(x, start, seqlen, tl.arange(0, s.n1), s.n, s.q)
    second = first
    if s.n2 > 0:
        second = load_tile(x, start, seqlen, s.n1 + tl.arange(0, s.n2), s.n, s.q)
    return first, second


@triton.jit
def store_tile(pointer, start, seqlen, columns, width: tl.constexpr, row_stride, value, q: tl.constexpr):
    """Store (q, columns) from `pointer` on, for rows of contiguous columns, in the pointer's dtype."""
    rows = tl.arange(0, q).to(tl.int64)
    mask = (rows[:, None] < seqlen - start) & (columns[None, :] < width)
    tl.store(pointer + rows[:, None] * row_stride + columns[None, :], value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, acc, s):
    """a @ b + acc in float32."""
    return tl.dot(a, b, acc=acc, input_precision=s.precision)


@triton.jit
def dot_n(a1, a2, b1, b2, acc, s):
    """a @ b + acc for a (rows, n) and b (n, columns), each in two tiles of n."""
    acc = dot(a1, b1, acc, s)
    if s.n2 > 0:
        acc = dot(a2, b2, acc, s)
    return acc


@triton.jit
def zeros_n(rows: tl.constexpr, s):
    """(n1, rows) and (n2, rows) of zeros."""
    first = tl.zeros((s.n1, rows), dtype=tl.float32)
    second = first
    if s.n2 > 0:
        second = tl.zeros((s.n2, rows), dtype=tl.float32)
    return first, second


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp2(-z * LOG2E))


@triton.jit
def softplus(raw):
    """log(1 + exp(raw)) to within float32's rounding.

    Near raw = -7, where steps of 1e-3 come from, 1 + exp(raw) has lost half of exp(raw)'s digits. Up to exp(raw) =
    1/4 the series 2 atanh(t), t = e / (2 + e), is used: its first omitted term is below 1e-9 of the result.
    """
    e = tl.exp2(tl.minimum(raw, 20.0) * LOG2E)
    t = e / (2.0 + e)
    t2 = t * t
    series = 2.0 * t * (1.0 + t2 * (1.0 / 3.0 + t2 * (1.0 / 5.0 + t2 * (1.0 / 7.0 + t2 * (1.0 / 9.0)))))
    return tl.where(raw > 20.0, raw, tl.where(e < 0.25, series, tl.log(1.0 + e)))


@triton.jit
def activate(clock, head, start, seqlen, s):
    """dt before and after softplus, (q), float32."""
    rows = tl.arange(0, s.q).to(tl.int64)
    pointers = clock.dt.data + head * clock.dt.head + start * clock.dt.token + rows * clock.dt.token
    raw = tl.load(pointers, mask=rows < seqlen - start, other=0.0).to(tl.float32)
    if clock.bias is not None:
        raw += tl.load(clock.bias + head).to(tl.float32)
    if s.softplus:
        activated = softplus(raw)
    else:
        activated = raw
    return raw, activated


@triton.jit
def documents(seq_idx, start, seqlen, s):
    """Number of changes of `seq_idx` from the token before the step up to each token, (q); 0 without `seq_idx`."""
    rows = tl.arange(0, s.q)
    if seq_idx is not None:
        tokens = start + rows
        here = tl.load(seq_idx.data + tokens * seq_idx.token, mask=tokens < seqlen, other=0)
        follows = (tokens < seqlen) & (tokens > 0)
        before = tl.load(seq_idx.data + (tokens - 1) * seq_idx.token, mask=follows, other=0)
        return tl.cumsum((follows & (here != before)).to(tl.int32), axis=0)
    else:
        return tl.zeros_like(rows)


@triton.jit
def tick(clock, head, start, seqlen, s):
    """A step's dt, cs and decays: state before it -> token i; token j -> state after it; state before -> state after.

    Past the end dt is 0: the state neither decays nor is written there. A document boundary is an infinite decay,
    made by `where` and never by a product: nothing is ever inf * 0. Also returns the document of each token.
    """
    _, dt = activate(clock, head, start, seqlen, s)
    dt = tl.where(dt < clock.low, clock.low, tl.where(dt > clock.high, clock.high, dt))  # a NaN stays one
    rows = tl.arange(0, s.q)
    dt = tl.where(rows < seqlen - start, dt, 0.0)
    cs = tl.cumsum(dt * (tl.load(clock.A + head).to(tl.float32) * LOG2E), axis=0)
    # The last entry itself: another way to sum would round otherwise, and the last token's factor would not be 1.
    last = tl.sum(tl.where(rows == s.q - 1, cs, 0.0), axis=0)
    document = documents(clock.seq_idx, start, seqlen, s)
    into = tl.exp2(cs)
    out = tl.exp2(tl.minimum(last - cs, 0.0))
    through = tl.exp2(last)
    if clock.seq_idx is not None:
        final = tl.max(document, axis=0)
        into = tl.where(document == 0, into, 0.0)
        out = tl.where(document == final, out, 0.0)
        through = tl.where(final == 0, through, 0.0)
    return dt, cs, into, out, through, document


@triton.jit
def load_kept(pointer, columns, s):
    """A kept state (n, p), contiguous: (n1, p_tile) and (n2, p_tile)."""
    first = _load_state_tile(pointer, tl.arange(0, s.n1), columns, s)
    second = first
    if s.n2 > 0:
        second = _load_state_tile(pointer, s.n1 + tl.arange(0, s.n2), columns, s)
    return first, second


@triton.jit
def _load_state_tile(pointer, rows, columns, s):
    mask = (rows[:, None] < s.n) & (columns[None, :] < s.p)
    return tl.load(pointer + rows[:, None] * s.p + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_state(pointer, first, second, columns, n_stride: tl.constexpr, p_stride: tl.constexpr, wanted, s):
    """Store a state, in the pointer's dtype, if `wanted`: (n, p) with strides (p, 1) as kept, (1, n) as callers do."""
    _store_state_tile(pointer, first, tl.arange(0, s.n1), columns, n_stride, p_stride, wanted, s)
    if s.n2 > 0:
        _store_state_tile(pointer, second, s.n1 + tl.arange(0, s.n2), columns, n_stride, p_stride, wanted, s)


@triton.jit
def _store_state_tile(pointer, tile, rows, columns, n_stride: tl.constexpr, p_stride: tl.constexpr, wanted, s):
    mask = (rows[:, None] < s.n) & (columns[None, :] < s.p) & wanted
    pointers = pointer + rows[:, None] * n_stride + columns[None, :] * p_stride
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_given(given, batch, head, columns, s):
    """A caller's state as (n1, p_tile) and (n2, p_tile), float32."""
    pointer = given.data + batch * given.batch + head * given.head
    first = _load_given_tile(pointer, given, tl.arange(0, s.n1), columns, s)
    second = first
    if s.n2 > 0:
        second = _load_given_tile(pointer, given, s.n1 + tl.arange(0, s.n2), columns, s)
    return first, second


@triton.jit
def _load_given_tile(pointer, given, rows, columns, s):
    mask = (rows[:, None] < s.n) & (columns[None, :] < s.p)
    pointers = pointer + rows.to(tl.int64)[:, None] * given.n + columns.to(tl.int64)[None, :] * given.p
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def gated(value, gate):
    """value * silu(gate), in value's dtype."""
    wide = gate.to(tl.float32)
    return (value.to(tl.float32) * wide * sigmoid(wide)).to(value.dtype)


@triton.jit
def advance_with(state1, state2, value, weight, through, k1, k2, s):
    """through * state + sum over j of weight_j k_j value_jᵀ."""
    weighted = (value.to(tl.float32) * weight[:, None]).to(value.dtype)
    state1 = dot(tl.trans(k1), weighted, state1 * through, s)
    if s.n2 > 0:
        state2 = dot(tl.trans(k2), weighted, state2 * through, s)
    return state1, state2


@triton.jit
def advance(state1, state2, v, gate, k, clock, head, start, seqlen, columns, s, REVERSE: tl.constexpr):
    """One step of the state, or in REVERSE of its gradient; also returns the decay through the step.

    forward   S' = through S + sum_j out_j dt_j B_j x_jᵀ                    v = x, k = B
    reverse   R' = through R + sum_i into_i C_i (dout_i silu(gate_i))ᵀ      v = dout, k = C
    """
    dt, _, into, out, through, _ = tick(clock, head, start, seqlen, s)
    value = load_tile(v, start, seqlen, columns, s.p, s.q)
    if gate is not None:
        value = gated(value, load_tile(gate, start, seqlen, columns, s.p, s.q))
    k1, k2 = load_n(k, start, seqlen, s)
    weight = into if REVERSE else out * dt
    state1, state2 = advance_with(state1, state2, value, weight, through, k1, k2, s)
    return state1, state2, through
