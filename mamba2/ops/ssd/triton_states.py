"""States between chunks, without outputs: the walks that carry a state, or its gradient, over the sequence.

With S the state and R the gradient of the state, `cs` the cumulative sum of dt A inside a step of q tokens:

    S' = exp(cs_last) S + Σ_j exp(cs_last - cs_j) dt_j B_j x_jᵀ        R' = exp(cs_last) R + Σ_i exp(cs_i) C_i dout_iᵀ

A state is kept (in the input's dtype, as (n, p)) once per span of several steps: S as it enters the span, R as it
leaves it. The sequential walk carries it in float32 registers. Where there are too few sequences and heads to fill
the device, LOCAL starts one program per span from zero, and `_pass_kernel` then combines the spans.

Bytes per token (16-bit input, span of s tokens): sequential R  2 h p + 2 g n + dt + 2 h p n / s; LOCAL is the same,
and the pass reads and writes the kept states once more.
"""

import triton
import triton.language as tl

from mamba2.ops.ssd.triton_common import advance, at, at_batch, load_given, store_state, zeros_n


@triton.jit
def _states_kernel(
    v,  # Tokens: x, or dout when REVERSE
    gate,  # Tokens: z when REVERSE, or None
    k,  # Tokens: B, or C when REVERSE
    clock,
    carry,  # Given: gradient of the final state, or None; none when LOCAL
    kept,  # out: (b, spans, h, n, p)
    end,  # out: gradient of the initial state (b, h, p, n), or None; none when LOCAL
    through_spans,  # out when LOCAL: decay through each span (b, spans, h), float32
    seqlen,
    nheads,
    spans,
    s,  # Sizes
    REVERSE: tl.constexpr,
    LOCAL: tl.constexpr,
):
    """Grid (h * p tiles, b, LOCAL ? spans : 1). A program owns p_tile channels of one head, over a span or all.

    Used in two forms: REVERSE over the whole sequence (the backward pass), and LOCAL in either direction.
    """
    p_tiles: tl.constexpr = (s.p + s.p_tile - 1) // s.p_tile
    tile = tl.program_id(0) % p_tiles
    head = (tl.program_id(0) // p_tiles).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    columns = tile * s.p_tile + tl.arange(0, s.p_tile)
    v = at(v, batch, head)
    if gate is not None:
        gate = at(gate, batch, head)
    k = at(k, batch, head // s.heads_per_group)
    clock = at_batch(clock, batch)
    kept += (batch * spans * nheads + head) * (s.n * s.p)

    count = tl.cdiv(seqlen, s.q)
    first = tl.program_id(2) * s.span
    if LOCAL:
        count = tl.minimum(s.span, count - first)
    if carry is not None:
        state1, state2 = load_given(carry, batch, head, columns, s)
    else:
        state1, state2 = zeros_n(s.p_tile, s)

    through_span = 1.0
    for i in range(0, count):
        step = first + i
        if REVERSE:
            step = first + count - 1 - i
        if not LOCAL:
            span = step // s.span
            leaves = ((step + 1) % s.span == 0) | (i == 0)
            here = kept + span.to(tl.int64) * nheads * (s.n * s.p)
            store_state(here, state1, state2, columns, s.p, 1, leaves, s)
        start = step.to(tl.int64) * s.q
        state1, state2, through = advance(state1, state2, v, gate, k, clock, head, start, seqlen, columns, s, REVERSE)
        through_span *= through

    if LOCAL:
        span = tl.program_id(2).to(tl.int64)
        store_state(kept + span * nheads * (s.n * s.p), state1, state2, columns, s.p, 1, True, s)
        tl.store(through_spans + (batch * spans + span) * nheads + head, through_span, mask=tile == 0)
    elif end is not None:
        end += (batch * nheads + head) * (s.n * s.p)
        store_state(end, state1, state2, columns, 1, s.n, True, s)


@triton.jit
def _pass_kernel(
    states,  # in: what each span adds (b, spans, h, n, p); out, in place: the state entering (or leaving) each span
    through_spans,  # (b, spans, h), float32
    carry,  # Given: initial state, or gradient of the final one when REVERSE, or None
    end,  # out: final state, or gradient of the initial one: (b, h, p, n), or None
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
        pointers = carry.data + batch * carry.batch + head * carry.head
        pointers += column.to(tl.int64) * carry.p + row.to(tl.int64) * carry.n
        state += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    for i in range(0, spans):
        span = tl.cast(i, tl.int64)
        if REVERSE:
            span = spans - 1 - span
        here = states + span * nheads * (n * p) + index
        local = tl.load(here, mask=inside, other=0.0).to(tl.float32)
        tl.store(here, state.to(states.dtype.element_ty), mask=inside)
        state = state * tl.load(through_spans + span * nheads) + local
    if end is not None:
        end += (batch * nheads + head) * (n * p)
        tl.store(end + column * n + row, state.to(end.dtype.element_ty), mask=inside)
