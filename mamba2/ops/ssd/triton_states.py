"""States between spans, where there are too few sequences and heads to fill a device with walks over whole sequences.

With S the state and R the gradient of the state, `cs` the cumulative sum of dt A inside a chunk of Q tokens:

    S' = exp(cs_last) S + Σ_j exp(cs_last - cs_j) dt_j B_j x_jᵀ        R' = exp(cs_last) R + Σ_i exp(cs_i) C_i dout_iᵀ

`_states_kernel` computes what each span of s tokens adds, starting from zero; `_pass_kernel` then carries the state
from span to span and leaves, for each, the state that enters it (S) or the gradient of the one that leaves it (R).

Bytes per token, 16-bit input: 2 h p + 2 g n + 8 h, and three times the states, 6 h p n / s.
"""

import triton
import triton.language as tl

from mamba2.ops.ssd.triton_common import (
    add_outer,
    keep,
    load_chunk_decays,
    load_head,
    load_rows,
    scaled,
    zero_state,
)


@triton.jit
def _states_kernel(
    v,  # x, or dout when REVERSE: (b, l, h, p)
    k,  # B, or C when REVERSE: (b, l, g, n)
    steps,  # (b, h, l)
    cs,  # (b, h, l)
    document,  # (b, l) or None
    kept,  # out: (b, spans, h, n, p)
    through_spans,  # out: decay through each span (b, spans, h), float32
    batch_strides,  # of v, k
    seqlen,
    spans,
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
    """Grid (h * p tiles, b, spans). A program owns P_TILE channels of one head, over a span."""
    p_tiles: tl.constexpr = (p + P_TILE - 1) // P_TILE
    SPAN: tl.constexpr = SPAN_CHUNKS * Q
    head = (tl.program_id(0) // p_tiles).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    span = tl.program_id(2)
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
        step, _, _, into, out, through = load_chunk_decays(steps, cs, document, start, seqlen, Q, SPAN)
        value = load_head(v, start, seqlen, columns, v_strides, p, Q)
        k1, k2 = load_rows(k, start, seqlen, k_strides, n, Q, N1, N2)
        weighted = scaled(value, into if REVERSE else out * step)
        state1, state2 = add_outer(state1, state2, k1, k2, weighted, through, N2, PRECISION)
        through_span *= through

    here = (batch * spans + span) * h + head
    keep(kept + here * (n * p), state1, state2, columns, p, n, N1, N2)
    tl.store(through_spans + here, through_span, mask=tile == 0)


@triton.jit
def _pass_kernel(
    states,  # in: (b, spans, h, n, p) what each span adds; out: the state entering (leaving) each
    through_spans,  # (b, spans, h), float32
    carry,  # initial state, or gradient of the final one when REVERSE: (b, h, p, n), or None
    end,  # out: final state, or gradient of the initial one: (b, h, p, n), or None
    carry_batch,
    spans,
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
        local = tl.load(here, mask=inside, other=0.0).to(tl.float32)
        tl.store(here, state.to(states.dtype.element_ty), mask=inside)
        state = state * tl.load(through_spans + span * h) + local
    if end is not None:
        tl.store(end + (batch * h + head) * (n * p) + column * n + row, state, mask=inside)
