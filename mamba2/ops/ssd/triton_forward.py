"""SSD forward: outputs and states in one walk over the sequence.

Inside a step of q tokens, with `cs` the inclusive cumulative sum of dt A and S the state before the step:

    y_i = Σ_{j<=i} (C_i·B_j) exp(cs_i - cs_j) dt_j x_j + exp(cs_i) Sᵀ C_i + D x_i        then y_i · silu(z_i)
    S'  = exp(cs_last) S + Σ_j exp(cs_last - cs_j) dt_j B_j x_jᵀ

The state never leaves registers, except for a copy in the input's dtype as it enters each span of s tokens, which is
all that the backward pass needs. C_i·B_j is recomputed by every head of a group: it costs 2 q n operations per token
and saves writing and reading a (l, q) matrix per group. The heads of a group are neighbours in the grid and share B
and C through L2.

Bytes per token, 16-bit input: x and y 4 h p, B and C 4 g n, dt 2 h or 4 h, kept states 2 h p n / s.
"""

import triton
import triton.language as tl

from mamba2.ops.ssd.triton_common import (
    advance_with,
    clamp_dt,
    decays,
    documents,
    dot,
    keep_state,
    load_dt,
    load_given_state,
    load_state,
    load_tile,
    store_given_state,
    store_tile,
    tile_rows,
)
from mamba2.ops.triton_math import LOG2E, silu


@triton.jit
def _scan_kernel(
    x,  # (b, l, h, p)
    dt,  # (b, l, h)
    A,  # (h)
    B,  # (b, l, g, n)
    C,  # (b, l, g, n)
    D,  # (h) or (h, p), or None
    z,  # (b, l, h, p) or None
    bias,  # (h) or None
    seq_idx,  # (b, l) or None
    initial,  # (b, h, p, n) or None; unused when FROM_KEPT
    y,  # out: (b, l, h, p), contiguous
    kept,  # (b, spans, h, n, p): out, or None; in when FROM_KEPT
    final,  # out: (b, h, p, n), float32, or None; unused when FROM_KEPT
    x_strides,
    dt_strides,
    B_strides,
    C_strides,
    D_strides,
    z_strides,
    seq_strides,
    initial_strides,
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
    FROM_KEPT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (h * p tiles, b, FROM_KEPT ? spans : 1). A program owns P_TILE channels of one head, over the sequence.

    FROM_KEPT: over one span only, from the state that earlier launches left in `kept`.
    """
    p_tiles: tl.constexpr = (p + P_TILE - 1) // P_TILE
    head = (tl.program_id(0) // p_tiles).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) % p_tiles * P_TILE + tl.arange(0, P_TILE)
    columns1 = tl.arange(0, N1)
    group = head // HEADS_PER_GROUP
    rows = tile_rows(Q, WIDE)
    narrow = x.dtype.element_ty

    x += batch * x_strides[0] + head * x_strides[2]
    dt += batch * dt_strides[0] + head * dt_strides[2]
    B += batch * B_strides[0] + group * B_strides[2]
    C += batch * C_strides[0] + group * C_strides[2]
    y += (batch * seqlen * nheads + head) * p
    if z is not None:
        z += batch * z_strides[0] + head * z_strides[2]
    if seq_idx is not None:
        seq_idx += batch * seq_strides[0]
    if kept is not None:
        kept += (batch * spans * nheads + head) * (n * p)
    if D is not None:
        skip = tl.load(D + head * D_strides[0] + columns * D_strides[1], mask=columns < p, other=0.0).to(tl.float32)
    rate = tl.load(A + head).to(tl.float32) * LOG2E

    state1 = tl.zeros((N1, P_TILE), dtype=tl.float32)
    state2 = state1
    if N2 > 0:
        state2 = tl.zeros((N2, P_TILE), dtype=tl.float32)
    first = tl.program_id(2) * SPAN_STEPS
    end = tl.cdiv(seqlen, Q)
    if FROM_KEPT:
        end = tl.minimum(end, first + SPAN_STEPS)
        source = kept + tl.program_id(2).to(tl.int64) * nheads * (n * p)
        state1 = load_state(source, columns, p, n, 0, N1).to(tl.float32)
        if N2 > 0:
            state2 = load_state(source, columns, p, n, N1, N2).to(tl.float32)
    elif initial is not None:
        initial += batch * initial_strides[0] + head * initial_strides[1]
        state1 = load_given_state(initial, initial_strides, columns, p, n, 0, N1)
        if N2 > 0:
            state2 = load_given_state(initial, initial_strides, columns, p, n, N1, N2)

    for step in tl.range(first, end, num_stages=STAGES):
        start = step * Q
        offset = start.to(tl.int64)
        left = seqlen - start
        x_tile = load_tile(x + offset * x_strides[1], rows, left, columns, p, x_strides[1], x_strides[3])
        B1 = load_tile(B + offset * B_strides[1], rows, left, columns1, n, B_strides[1], B_strides[3])
        C1 = load_tile(C + offset * C_strides[1], rows, left, columns1, n, C_strides[1], C_strides[3])
        B2 = B1
        C2 = C1
        if N2 > 0:
            columns2 = N1 + tl.arange(0, N2)
            B2 = load_tile(B + offset * B_strides[1], rows, left, columns2, n, B_strides[1], B_strides[3])
            C2 = load_tile(C + offset * C_strides[1], rows, left, columns2, n, C_strides[1], C_strides[3])
        _, activated = load_dt(dt + offset * dt_strides[1], dt_strides[1], rows, left, bias, head, SOFTPLUS)
        dt_step = clamp_dt(activated, rows, left, low, high)
        document = documents(
            seq_idx + offset * seq_strides[1] if seq_idx is not None else None, seq_strides[1], rows, start, left
        )
        cs = tl.cumsum(dt_step * rate, axis=0)
        into, out, through = decays(cs, document, rows, seq_idx is not None)

        # What earlier steps left: exp(cs_i) Sᵀ C_i.
        state1_narrow = state1.to(narrow)
        state2_narrow = state2.to(narrow)
        if kept is not None and not FROM_KEPT:
            enters = tl.where(step % SPAN_STEPS == 0, n, 0)
            span = step // SPAN_STEPS
            kept_here = kept + span.to(tl.int64) * nheads * (n * p)
            keep_state(kept_here, state1_narrow, columns, p, enters, 0, N1)
            if N2 > 0:
                keep_state(kept_here, state2_narrow, columns, p, enters, N1, N2)
        acc = dot(C1, state1_narrow, None, PRECISION)
        if N2 > 0:
            acc = dot(C2, state2_narrow, acc, PRECISION)
        acc *= into[:, None]

        # What the tokens of this step write and read.
        scores = dot(C1, tl.trans(B1), None, PRECISION)
        if N2 > 0:
            scores = dot(C2, tl.trans(B2), scores, PRECISION)
        scores *= tl.exp2(tl.minimum(cs[:, None] - cs[None, :], 0.0)) * dt_step[None, :]
        visible = rows[:, None] >= rows[None, :]
        if seq_idx is not None:
            visible = visible & (document[:, None] == document[None, :])
        scores = tl.where(visible, scores, 0.0)
        acc = dot(scores.to(narrow), x_tile, acc, PRECISION)

        state1, state2 = advance_with(state1, state2, x_tile, out * dt_step, through, B1, B2, N2, PRECISION)

        if D is not None:
            acc += x_tile.to(tl.float32) * skip[None, :]
        if z is not None:
            gate = load_tile(z + offset * z_strides[1], rows, left, columns, p, z_strides[1], z_strides[3])
            acc *= silu(gate.to(tl.float32))
        store_tile(y + offset * nheads * p, rows, left, columns, p, nheads * p, acc.to(narrow))

    if final is not None and not FROM_KEPT:
        final += (batch * nheads + head) * (n * p)
        store_given_state(final, state1, columns, p, n, 0, N1)
        if N2 > 0:
            store_given_state(final, state2, columns, p, n, N1, N2)
