"""SSD forward: outputs and states in one walk over the sequence.

Inside a chunk of Q tokens, with `cs` the inclusive cumulative sum of dt A and S the state before the chunk:

    y_i = Σ_{j<=i} (C_i·B_j) exp(cs_i - cs_j) dt_j x_j + exp(cs_i) Sᵀ C_i + D x_i        then y_i · silu(z_i)
    S'  = exp(cs_last) S + Σ_j exp(cs_last - cs_j) dt_j B_j x_jᵀ

The state never leaves registers, except for a copy in the input's dtype as it enters each span of s tokens, which is
all that the backward pass needs. C_i·B_j is recomputed by every head of a group: it costs 2 Q n operations per token
and saves a second reading of B and C, and writing and reading a (l, Q) matrix per group. The heads of a group are
neighbours in the grid and share B and C through L2.

Bytes per token, 16-bit input: x and y 4 h p, B and C 4 g n, steps and cs 8 h, kept states 2 h p n / s.
"""

import triton
import triton.language as tl

from mamba2.ops.ssd.triton_common import (
    add_outer,
    dot,
    dot_rows,
    dot_state,
    give,
    keep,
    load_chunk_decays,
    load_given,
    load_head,
    load_kept,
    load_rows,
    load_steps,
    scaled,
    store_tile,
    zero_state,
)
from mamba2.ops.triton_math import silu


@triton.jit
def _scan_kernel(
    x,  # (b, l, h, p)
    B,  # (b, l, g, n)
    C,  # (b, l, g, n)
    D,  # (h) or (h, p), or None
    z,  # (b, l, h, p) or None
    steps,  # (b, h, l)
    cs,  # (b, h, l)
    document,  # (b, l) or None
    initial,  # (b, h, p, n) or None; when FROM_KEPT only whether it is there matters
    y,  # out: (b, l, h, p), contiguous
    ungated,  # out: y before the gate, like y, or None
    kept,  # (b, spans, h, n, p): out, or None; in when FROM_KEPT
    final,  # out: (b, h, p, n), float32, or None; unused when FROM_KEPT
    batch_strides,  # of x, B, C, z, initial
    seqlen,
    spans,
    x_strides: tl.constexpr,  # over tokens, heads, channels; likewise below
    B_strides: tl.constexpr,
    C_strides: tl.constexpr,
    D_strides: tl.constexpr,
    z_strides: tl.constexpr,
    initial_strides: tl.constexpr,
    h: tl.constexpr,
    p: tl.constexpr,
    n: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    SPAN_CHUNKS: tl.constexpr,
    Q: tl.constexpr,
    P_TILE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    FROM_KEPT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (h * p tiles, b, FROM_KEPT ? spans : 1). A program owns P_TILE channels of one head, over the sequence.

    FROM_KEPT: over one span only, from the state that earlier launches left in `kept`. The first span's is neither
    written nor read where it is zero, without an initial state.
    """
    p_tiles: tl.constexpr = (p + P_TILE - 1) // P_TILE
    SPAN: tl.constexpr = SPAN_CHUNKS * Q
    head = (tl.program_id(0) // p_tiles).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    group = head // HEADS_PER_GROUP
    columns = tl.program_id(0) % p_tiles * P_TILE + tl.arange(0, P_TILE)
    rows = tl.arange(0, Q)
    narrow = x.dtype.element_ty

    x += batch * batch_strides[0] + head * x_strides[1]
    B += batch * batch_strides[1] + group * B_strides[1]
    C += batch * batch_strides[2] + group * C_strides[1]
    if z is not None:
        z += batch * batch_strides[3] + head * z_strides[1]
    steps += (batch * h + head) * seqlen
    cs += (batch * h + head) * seqlen
    if document is not None:
        document += batch * seqlen
    if kept is not None:
        kept += (batch * spans * h + head) * (n * p)
    if D is not None:
        skip = tl.load(D + head * D_strides[0] + columns * D_strides[1], mask=columns < p, other=0.0).to(tl.float32)

    first = tl.program_id(2) * SPAN_CHUNKS
    end = tl.cdiv(seqlen, Q)
    state1, state2 = zero_state(P_TILE, N1, N2)
    if FROM_KEPT:
        end = tl.minimum(end, first + SPAN_CHUNKS)
        rows_kept = n if initial is not None else tl.where(first > 0, n, 0)
        state1, state2 = load_kept(kept + tl.program_id(2).to(tl.int64) * h * (n * p), columns, p, rows_kept, N1, N2)
        state1, state2 = state1.to(tl.float32), state2.to(tl.float32)
    elif initial is not None:
        initial += batch * batch_strides[4] + head * initial_strides[0]
        state1, state2 = load_given(initial, columns, initial_strides, p, n, N1, N2)

    for chunk in tl.range(first, end, num_stages=STAGES, disable_licm=True):
        start = chunk * Q
        left = seqlen - start
        step = load_steps(steps, start, seqlen, Q)
        decay, number, into, out, through = load_chunk_decays(cs, document, start, seqlen, Q, SPAN)
        narrow1, narrow2 = state1.to(narrow), state2.to(narrow)
        if kept is not None and not FROM_KEPT:
            here = kept + tl.cast(chunk // SPAN_CHUNKS, tl.int64) * h * (n * p)
            enters = chunk % SPAN_CHUNKS == 0
            if initial is None:
                enters = enters & (chunk > 0)
            keep(here, narrow1, narrow2, columns, p, tl.where(enters, n, 0), N1, N2)

        # What earlier chunks left.
        C1, C2 = load_rows(C, start, seqlen, C_strides, n, Q, N1, N2)
        acc = dot_state(C1, C2, narrow1, narrow2, N2, PRECISION) * into[:, None]
        # What the tokens of this chunk write and read.
        B1, B2 = load_rows(B, start, seqlen, B_strides, n, Q, N1, N2)
        scores = dot_rows(C1, C2, B1, B2, N2, PRECISION)  # (i, j)
        scores *= tl.exp2(tl.minimum(decay[:, None] - decay[None, :], 0.0)) * step[None, :]
        visible = rows[:, None] >= rows[None, :]
        if document is not None:
            visible = visible & (number[:, None] == number[None, :])
        x_tile = load_head(x, start, seqlen, columns, x_strides, p, Q)
        acc = dot(tl.where(visible, scores, 0.0).to(narrow), x_tile, acc, PRECISION)
        if D is not None:
            acc += x_tile.to(tl.float32) * skip[None, :]
        token = ((batch * seqlen + start) * h + head) * p
        if ungated is not None:
            store_tile(ungated + token, rows, left, columns, p, h * p, acc)
        if z is not None:
            acc *= silu(load_head(z, start, seqlen, columns, z_strides, p, Q).to(tl.float32))
        store_tile(y + token, rows, left, columns, p, h * p, acc)

        state1, state2 = add_outer(state1, state2, B1, B2, scaled(x_tile, out * step), through, N2, PRECISION)

    if final is not None and not FROM_KEPT:
        give(final + (batch * h + head) * (n * p), state1, state2, columns, p, n, N1, N2)
