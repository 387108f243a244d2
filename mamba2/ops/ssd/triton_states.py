"""States between chunks, without outputs: the walks that carry a state, or its gradient, over the sequence.

With S the state and R the gradient of the state, `cs` the cumulative sum of dt A inside a step of q tokens:

    S' = exp(cs_last) S + Σ_j exp(cs_last - cs_j) dt_j B_j x_jᵀ        R' = exp(cs_last) R + Σ_i exp(cs_i) C_i dout_iᵀ

A state is kept (in the input's dtype, as (n, p)) once per span of several steps: S as it enters the span, R as it
leaves it. Both sequential walks carry it in float32 registers. Where there are too few sequences and heads to fill
the device, `local` starts one program per span from zero, and `_pass_kernel` then combines the spans.

Bytes per token (16-bit input, span of s tokens): sequential R  2 h p + 2 g n + dt + 2 h p n / s; local is the same,
and the pass reads and writes the kept states once more.
"""

import triton
import triton.language as tl

from mamba2.ops.ssd.triton_common import advance, keep_state, load_given_state, store_given_state
from mamba2.ops.triton_math import LOG2E


@triton.jit
def _states_kernel(
    v,  # x, or dout when REVERSE: (b, l, h, p)
    z,  # gate of dout: (b, l, h, p), or None
    k,  # B, or C when REVERSE: (b, l, g, n)
    dt,  # (b, l, h)
    A,  # (h)
    bias,  # (h) or None
    seq_idx,  # (b, l) or None
    carry,  # gradient of the final state (b, h, p, n), or None; unused when LOCAL
    kept,  # out: (b, spans, h, n, p)
    end,  # out: gradient of the initial state (b, h, p, n), or None; unused when LOCAL
    through_spans,  # out when LOCAL: decay through each span (b, spans, h), float32
    v_strides,
    z_strides,
    k_strides,
    dt_strides,
    seq_strides,
    carry_strides,
    seqlen,
    nheads,
    spans,
    low,
    high,
    p: tl.constexpr,
    n: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    SPAN_STEPS: tl.constexpr,
    Q: tl.constexpr,
    P_TILE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    LOCAL: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Grid (h * p tiles, b, LOCAL ? spans : 1). A program owns P_TILE channels of one head, over a span or all.

    Two forms are used: REVERSE over the whole sequence (the backward pass), and LOCAL in either direction.
    """
    p_tiles: tl.constexpr = (p + P_TILE - 1) // P_TILE
    head = (tl.program_id(0) // p_tiles).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) % p_tiles
    columns = tile * P_TILE + tl.arange(0, P_TILE)
    group = head // HEADS_PER_GROUP

    v += batch * v_strides[0] + head * v_strides[2]
    k += batch * k_strides[0] + group * k_strides[2]
    dt += batch * dt_strides[0] + head * dt_strides[2]
    if z is not None:
        z += batch * z_strides[0] + head * z_strides[2]
    if seq_idx is not None:
        seq_idx += batch * seq_strides[0]
    rate = tl.load(A + head).to(tl.float32) * LOG2E
    kept += (batch * spans * nheads + head) * (n * p)

    steps = tl.cdiv(seqlen, Q)
    first = tl.program_id(2) * SPAN_STEPS
    if LOCAL:
        count = tl.minimum(SPAN_STEPS, steps - first)
    else:
        count = steps

    state1 = tl.zeros((N1, P_TILE), dtype=tl.float32)
    state2 = state1
    if N2 > 0:
        state2 = tl.zeros((N2, P_TILE), dtype=tl.float32)
    if carry is not None:
        carry += batch * carry_strides[0] + head * carry_strides[1]
        state1 = load_given_state(carry, carry_strides, columns, p, n, 0, N1)
        if N2 > 0:
            state2 = load_given_state(carry, carry_strides, columns, p, n, N1, N2)

    through_span = 1.0
    for i in range(0, count):
        step = first + i
        if REVERSE:
            step = first + count - 1 - i
        if not LOCAL:
            leaves = ((step + 1) % SPAN_STEPS == 0) | (i == 0)
            kept_here = kept + (step // SPAN_STEPS).to(tl.int64) * nheads * (n * p)
            keep_state(kept_here, state1, columns, p, tl.where(leaves, n, 0), 0, N1)
            if N2 > 0:
                keep_state(kept_here, state2, columns, p, tl.where(leaves, n, 0), N1, N2)
        start = step * Q
        offset = start.to(tl.int64)
        state1, state2, through = advance(
            state1,
            state2,
            v + offset * v_strides[1],
            v_strides,
            z + offset * z_strides[1] if z is not None else None,
            z_strides,
            k + offset * k_strides[1],
            k_strides,
            dt + offset * dt_strides[1],
            dt_strides[1],
            seq_idx + offset * seq_strides[1] if seq_idx is not None else None,
            seq_strides[1],
            bias,
            head,
            rate,
            start,
            seqlen - start,
            columns,
            low,
            high,
            p,
            n,
            Q,
            N1,
            N2,
            SOFTPLUS,
            REVERSE,
            PRECISION,
            WIDE,
        )
        through_span *= through

    if LOCAL:
        span = tl.program_id(2).to(tl.int64)
        kept += span * nheads * (n * p)
        keep_state(kept, state1, columns, p, n, 0, N1)
        if N2 > 0:
            keep_state(kept, state2, columns, p, n, N1, N2)
        tl.store(through_spans + (batch * spans + span) * nheads + head, through_span, mask=tile == 0)
    elif end is not None:
        end += (batch * nheads + head) * (n * p)
        store_given_state(end, state1, columns, p, n, 0, N1)
        if N2 > 0:
            store_given_state(end, state2, columns, p, n, N1, N2)


@triton.jit
def _pass_kernel(
    states,  # in: (b, spans, h, n, p) what each span adds; out: the state entering (leaving) each
    through_spans,  # (b, spans, h), float32
    carry,  # initial state, or gradient of the final one when REVERSE: (b, h, p, n), or None
    end,  # out: final state, or gradient of the initial one: (b, h, p, n), or None
    carry_strides,
    nheads,
    spans,
    p: tl.constexpr,
    n: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Grid (blocks of n * p, h, b). carry' = through_span * carry + local, in float32, over the spans in order.

    A program reads an element and then overwrites it; no other program touches it.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    row = index // p
    column = index % p
    inside = index < n * p
    states += (batch * spans * nheads + head) * (n * p)
    through_spans += batch * spans * nheads + head

    state = tl.zeros((BLOCK,), dtype=tl.float32)
    if carry is not None:
        carry += batch * carry_strides[0] + head * carry_strides[1]
        offsets = column.to(tl.int64) * carry_strides[2] + row.to(tl.int64) * carry_strides[3]
        state += tl.load(carry + offsets, mask=inside, other=0.0).to(tl.float32)
    for i in range(0, spans):
        span = i
        if REVERSE:
            span = spans - 1 - i
        offset = tl.cast(span, tl.int64) * nheads
        here = states + offset * (n * p) + index
        local = tl.load(here, mask=inside, other=0.0).to(tl.float32)
        tl.store(here, state.to(states.dtype.element_ty), mask=inside)
        state = state * tl.load(through_spans + offset) + local
    if end is not None:
        tl.store(end + (batch * nheads + head) * (n * p) + column * n + row, state, mask=inside)
