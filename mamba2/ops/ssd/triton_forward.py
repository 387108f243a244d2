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
    at,
    at_batch,
    dot,
    dot_n,
    load_given,
    load_kept,
    load_n,
    load_tile,
    sigmoid,
    store_state,
    store_tile,
    tick,
    zeros_n,
)


@triton.jit
def _scan_kernel(
    x,  # Tokens (b, l, h, p)
    B,  # Tokens (b, l, g, n)
    C,  # Tokens (b, l, g, n)
    z,  # Tokens (b, l, h, p), or None
    clock,
    D,  # PerChannel, or None
    initial,  # Given, or None; none when FROM_KEPT
    y,  # out: (b, l, h, p), contiguous
    kept,  # (b, spans, h, n, p): out, or None; in when FROM_KEPT
    final,  # out: (b, h, p, n), float32, or None; none when FROM_KEPT
    seqlen,
    nheads,
    spans,
    s,  # Sizes
    FROM_KEPT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (h * p tiles, b, FROM_KEPT ? spans : 1). A program owns p_tile channels of one head, over the sequence.

    FROM_KEPT: over one span only, from the state that earlier launches left in `kept`.
    """
    p_tiles: tl.constexpr = (s.p + s.p_tile - 1) // s.p_tile
    head = (tl.program_id(0) // p_tiles).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) % p_tiles * s.p_tile + tl.arange(0, s.p_tile)
    rows = tl.arange(0, s.q)
    narrow = x.data.dtype.element_ty
    x = at(x, batch, head)
    B = at(B, batch, head // s.heads_per_group)
    C = at(C, batch, head // s.heads_per_group)
    if z is not None:
        z = at(z, batch, head)
    clock = at_batch(clock, batch)
    y += (batch * seqlen * nheads + head) * s.p
    if kept is not None:
        kept += (batch * spans * nheads + head) * (s.n * s.p)
    if D is not None:
        skip = tl.load(D.data + head * D.head + columns * D.column, mask=columns < s.p, other=0.0).to(tl.float32)

    first = tl.program_id(2) * s.span
    end = tl.cdiv(seqlen, s.q)
    if FROM_KEPT:
        end = tl.minimum(end, first + s.span)
        state1, state2 = load_kept(kept + tl.program_id(2).to(tl.int64) * nheads * (s.n * s.p), columns, s)
        state1 = state1.to(tl.float32)
        state2 = state2.to(tl.float32)
    elif initial is not None:
        state1, state2 = load_given(initial, batch, head, columns, s)
    else:
        state1, state2 = zeros_n(s.p_tile, s)

    for i in tl.range(first, end, num_stages=STAGES):
        step = tl.cast(i, tl.int32)
        start = step.to(tl.int64) * s.q
        x_tile = load_tile(x, start, seqlen, columns, s.p, s.q)
        B1, B2 = load_n(B, start, seqlen, s)
        C1, C2 = load_n(C, start, seqlen, s)
        dt, cs, into, out, through, document = tick(clock, head, start, seqlen, s)

        # What earlier steps left: exp(cs_i) Sᵀ C_i.
        state1_narrow = state1.to(narrow)
        state2_narrow = state2.to(narrow)
        if kept is not None and not FROM_KEPT:
            span = step // s.span
            here = kept + span.to(tl.int64) * nheads * (s.n * s.p)
            store_state(here, state1_narrow, state2_narrow, columns, s.p, 1, step % s.span == 0, s)
        acc = dot_n(C1, C2, state1_narrow, state2_narrow, None, s) * into[:, None]

        # What the tokens of this step write and read.
        scores = dot_n(C1, C2, tl.trans(B1), tl.trans(B2), None, s)
        scores *= tl.exp2(tl.minimum(cs[:, None] - cs[None, :], 0.0)) * dt[None, :]
        visible = rows[:, None] >= rows[None, :]
        if clock.seq_idx is not None:
            visible = visible & (document[:, None] == document[None, :])
        acc = dot(tl.where(visible, scores, 0.0).to(narrow), x_tile, acc, s)

        state1, state2 = advance_with(state1, state2, x_tile, out * dt, through, B1, B2, s)

        if D is not None:
            acc += x_tile.to(tl.float32) * skip[None, :]
        if z is not None:
            gate = load_tile(z, start, seqlen, columns, s.p, s.q).to(tl.float32)
            acc *= gate * sigmoid(gate)
        store_tile(y + start * nheads * s.p, start, seqlen, columns, s.p, nheads * s.p, acc, s.q)

    if final is not None:
        final += (batch * nheads + head) * (s.n * s.p)
        store_state(final, state1, state2, columns, 1, s.n, True, s)
