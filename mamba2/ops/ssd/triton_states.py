"""States between spans: the state that enters each (S), or the gradient of the one that leaves it (R).

With `cs` the cumulative sum of dt A inside a chunk of Q tokens:

    S' = exp(cs_last) S + Σ_j exp(cs_last - cs_j) dt_j B_j x_jᵀ        R' = exp(cs_last) R + Σ_i exp(cs_i) C_i dout_iᵀ

`_reverse_kernel` computes R in one walk over the sequence, from its end; the forward scan has S on its own way. Where
there are too few sequences and heads to fill a device with such walks, `_states_kernel` computes what each span of s
tokens adds, starting from zero, and `_pass_kernel` carries S or R from span to span.

The tokens of the last span matter to the final state alone, those of the first to the gradient of the initial state
alone: where it is not wanted they are not read. The state that begins is not written where it is zero.

Bytes per token, 16-bit input: 2 h p + 2 g n + 8 h for S, 4 h for R; states 2 h p n / s in one walk, else thrice that.
"""

import triton
import triton.language as tl

from mamba2.ops.ssd.triton_common import (
    add_outer,
    give,
    keep,
    load_chunk_decays,
    load_given,
    load_head,
    load_rows,
    load_steps,
    scaled,
    zero_state,
)


@triton.jit
def _reverse_kernel(
    dout,  # (b, l, h, p)
    C,  # (b, l, g, n)
    cs,  # (b, h, l)
    document,  # (b, l) or None
    carry,  # gradient of the final state (b, h, p, n), or None
    kept,  # out: (b, spans, h, n, p)
    initial,  # out: gradient of the initial state (b, h, p, n), or None
    batch_strides,  # of dout, C, carry
    seqlen,
    spans,
    dout_strides: tl.constexpr,  # over tokens, heads, channels; likewise below
    C_strides: tl.constexpr,
    carry_strides: tl.constexpr,
    h: tl.constexpr,
    p: tl.constexpr,
    n: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    SPAN_CHUNKS: tl.constexpr,
    Q: tl.constexpr,
    P_TILE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (h * p tiles, b). A program owns P_TILE channels of one head, over the sequence; R stays in registers."""
    p_tiles: tl.constexpr = (p + P_TILE - 1) // P_TILE
    SPAN: tl.constexpr = SPAN_CHUNKS * Q
    head = (tl.program_id(0) // p_tiles).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) % p_tiles * P_TILE + tl.arange(0, P_TILE)
    narrow = dout.dtype.element_ty

    dout += batch * batch_strides[0] + head * dout_strides[1]
    C += batch * batch_strides[1] + head // HEADS_PER_GROUP * C_strides[1]
    cs += (batch * h + head) * seqlen
    if document is not None:
        document += batch * seqlen
    kept += (batch * spans * h + head) * (n * p)

    state1, state2 = zero_state(P_TILE, N1, N2)
    if carry is not None:
        carry += batch * batch_strides[2] + head * carry_strides[0]
        state1, state2 = load_given(carry, columns, carry_strides, p, n, N1, N2)
        last = kept + tl.cast(spans - 1, tl.int64) * h * (n * p)
        keep(last, state1.to(narrow), state2.to(narrow), columns, p, n, N1, N2)

    chunks = tl.cdiv(seqlen, Q)
    count = chunks if initial is not None else chunks - SPAN_CHUNKS
    for back in tl.range(0, count, num_stages=STAGES, disable_licm=True):
        chunk = chunks - 1 - back
        start = chunk * Q
        _, _, into, _, through = load_chunk_decays(cs, document, start, seqlen, Q, SPAN)
        C1, C2 = load_rows(C, start, seqlen, C_strides, n, Q, N1, N2)
        dy = load_head(dout, start, seqlen, columns, dout_strides, p, Q)
        state1, state2 = add_outer(state1, state2, C1, C2, scaled(dy, into), through, N2, PRECISION)
        leaves = (chunk % SPAN_CHUNKS == 0) & (chunk > 0)  # the span before
        before = kept + tl.cast(chunk // SPAN_CHUNKS - 1, tl.int64) * h * (n * p)
        keep(before, state1.to(narrow), state2.to(narrow), columns, p, tl.where(leaves, n, 0), N1, N2)
    if initial is not None:
        give(initial + (batch * h + head) * (n * p), state1, state2, columns, p, n, N1, N2)


@triton.jit
def _states_kernel(
    v,  # x, or dout when REVERSE: (b, l, h, p)
    k,  # B, or C when REVERSE: (b, l, g, n)
    steps,  # (b, h, l); unused when REVERSE
    cs,  # (b, h, l)
    document,  # (b, l) or None
    kept,  # out: (b, spans, h, n, p)
    through_spans,  # out: decay through each span (b, spans, h), float32
    batch_strides,  # of v, k
    seqlen,
    spans,
    skipped,  # spans before those that are walked
    v_strides: tl.constexpr,
    k_strides: tl.constexpr,
    h: tl.constexpr,
    p: tl.constexpr,
    n: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    SPAN_CHUNKS: tl.constexpr,
    Q: tl.constexpr,
    P_TILE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (h * p tiles, b, spans walked). A program owns P_TILE channels of one head, over a span."""
    p_tiles: tl.constexpr = (p + P_TILE - 1) // P_TILE
    SPAN: tl.constexpr = SPAN_CHUNKS * Q
    head = (tl.program_id(0) // p_tiles).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    span = skipped + tl.program_id(2)
    tile = tl.program_id(0) % p_tiles
    columns = tile * P_TILE + tl.arange(0, P_TILE)

    v += batch * batch_strides[0] + head * v_strides[1]
    k += batch * batch_strides[1] + head // HEADS_PER_GROUP * k_strides[1]
    steps += (batch * h + head) * seqlen
    cs += (batch * h + head) * seqlen
    if document is not None:
        document += batch * seqlen

    first = span * SPAN_CHUNKS
    count = tl.minimum(SPAN_CHUNKS, tl.cdiv(seqlen, Q) - first)
    state1, state2 = zero_state(P_TILE, N1, N2)
    through_span = 1.0
    for i in tl.range(0, count, num_stages=STAGES, disable_licm=True):
        start = (first + (count - 1 - i if REVERSE else i)) * Q
        _, _, into, out, through = load_chunk_decays(cs, document, start, seqlen, Q, SPAN)
        value = load_head(v, start, seqlen, columns, v_strides, p, Q)
        k1, k2 = load_rows(k, start, seqlen, k_strides, n, Q, N1, N2)
        weighted = scaled(value, into if REVERSE else out * load_steps(steps, start, seqlen, Q))
        state1, state2 = add_outer(state1, state2, k1, k2, weighted, through, N2, PRECISION)
        through_span *= through

    here = (batch * spans + span) * h + head
    keep(kept + here * (n * p), state1, state2, columns, p, n, N1, N2)
    tl.store(through_spans + here, through_span, mask=tile == 0)


@triton.jit
def _pass_kernel(
    states,  # in: (b, spans, h, n, p) what each span walked adds; out: the state entering (leaving) each
    through_spans,  # (b, spans, h), float32
    carry,  # initial state, or gradient of the final one when REVERSE: (b, h, p, n), or None
    end,  # out: final state, or gradient of the initial one: (b, h, p, n), or None
    carry_batch,
    spans,
    walked,  # how many of the spans, in the order of the walk, have added something
    carry_strides: tl.constexpr,
    h: tl.constexpr,
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
    states += (batch * spans * h + head) * (n * p)
    through_spans += batch * spans * h + head

    state = tl.zeros((BLOCK,), dtype=tl.float32)
    if carry is not None:
        carry += batch * carry_batch + head * carry_strides[0]
        offsets = column.to(tl.int64) * carry_strides[1] + row.to(tl.int64) * carry_strides[2]
        state += tl.load(carry + offsets, mask=inside, other=0.0).to(tl.float32)
    for i in range(0, spans):
        span = tl.cast(spans - 1 - i if REVERSE else i, tl.int64)
        here = states + span * h * (n * p) + index
        local = tl.load(here, mask=inside & (i < walked), other=0.0).to(tl.float32)
        known = inside if carry is not None else inside & (i > 0)
        tl.store(here, state.to(states.dtype.element_ty), mask=known)
        state = state * tl.load(through_spans + span * h, mask=i < walked, other=0.0) + local
    if end is not None:
        tl.store(end + (batch * h + head) * (n * p) + column * n + row, state, mask=inside)
