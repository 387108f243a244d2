"""SSD backward, last part: the gradient of dt, from the sums that `triton_gradient`'s launch left.

For the decays a_k = dt_k A of a span, with W, s, S and R as in `triton_gradient` and w_j = exp(cs_last - cs_j) dt_j
x_j·(Rᵀ B_j):

    da_k  = Σ_{j<k<=i} W_ij + Σ_{i>=k} s_i + Σ_{j<k} w_j + exp(cs_last) <R, S>
    ddt_k = u_k·x_k + A da_k      dA = Σ_k dt_k da_k      then through the clamp and softplus; d(dt_bias) = Σ_k ddt_k

For j in k's chunk, v_j of `triton_reverse` is w_j and those W_ij whose i is in a later chunk, summed. A program leaves
its span's share of dA and d(dt_bias), which `mamba2.ops.triton_reduce` sums in a fixed order.

Bytes per token, 16-bit dt, spans of s tokens, chunks of Q: sums of W 2 h (s / Q + 1); s, v and u·x 12 h; dt, ddt 4 h.
"""

import triton
import triton.language as tl

from mamba2.ops.ssd.triton_common import span_states
from mamba2.ops.ssd.triton_decays import activate, clamp
from mamba2.ops.triton_math import sigmoid


@triton.jit
def _finish_kernel(
    dt,  # (b, l, h)
    A,  # (h)
    bias,  # (h) or None
    sums,  # (d + 1, b, h, l)
    walked,  # (2, b, h, p tiles, l)
    totals,  # (b, h, chunks)
    RS,  # (b, spans, h, p tiles)
    ddt,  # out: (b, l, h), contiguous
    shares,  # out: (b, spans, 2 h), float32: dA, d(dt_bias)
    dt_batch,
    seqlen,
    spans,
    plane,
    low,
    high,
    dt_strides: tl.constexpr,
    h: tl.constexpr,
    P_TILES: tl.constexpr,
    SPAN_CHUNKS: tl.constexpr,
    Q: tl.constexpr,
    INITIAL: tl.constexpr,
    CARRY: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """Grid (spans, h, b). A span's tokens are held as (chunks, Q).

    Pairs of one chunk cancel in the difference of their sums by row and by column where both come after k. Those of two
    chunks are added where they count and nowhere else, so that a longer span loses no digits.
    """
    SPAN: tl.constexpr = SPAN_CHUNKS * Q
    span = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start = span * SPAN
    chunk = tl.arange(0, SPAN_CHUNKS)
    tokens = chunk[:, None] * Q + tl.arange(0, Q)[None, :]
    inside = start + tokens < seqlen
    chunks = tl.cdiv(seqlen, Q)
    sequence = batch * h + head
    plane = tl.cast(plane, tl.int64)
    sums += sequence * seqlen + start + tokens

    enters, leaves = span_states(span, spans, INITIAL, CARRY)
    s = tl.load(sums + SPAN_CHUNKS * plane, mask=inside & enters, other=0.0)
    after = s + tl.load(sums, mask=inside, other=0.0)  # to be summed over i >= k of k's chunk
    before = tl.zeros_like(s)  # over j < k of k's chunk
    gradient = tl.zeros_like(s)
    through = 0.0
    for tile in tl.static_range(P_TILES):
        of_tile = walked + (sequence * P_TILES + tile) * seqlen + start + tokens
        gradient += tl.load(of_tile, mask=inside, other=0.0)
        before += tl.load(of_tile + plane * P_TILES, mask=inside, other=0.0)
        of_span = RS + ((batch * spans + span) * h + head) * P_TILES + tile
        through += tl.load(of_span, mask=enters & leaves, other=0.0)
    here = span * SPAN_CHUNKS + chunk
    total = tl.load(totals + sequence * chunks + here, mask=(here < chunks) & leaves, other=0.0)
    later = chunk[None, :] > chunk[:, None]
    across = through + tl.sum(tl.where(later, tl.sum(s, axis=1)[None, :], 0.0), axis=1)
    across += tl.sum(tl.where(later, total[:, None], 0.0), axis=0)
    for d in tl.static_range(1, SPAN_CHUNKS):
        by_row = tl.load(sums + d * plane, mask=inside & (chunk[:, None] >= d), other=0.0)
        after += by_row
        # from a chunk before k's to one after it
        spans_k = later & (chunk[None, :] - d < chunk[:, None])
        across += tl.sum(tl.where(spans_k, tl.sum(by_row, axis=1)[None, :], 0.0), axis=1)
    da = tl.cumsum(after, axis=1, reverse=True) + tl.cumsum(before, axis=1) - before + across[:, None]
    gradient += da * tl.load(A + head).to(tl.float32)

    dt += batch * dt_batch + head * dt_strides[1] + tl.cast(start, tl.int64) * dt_strides[0]
    raw, activated = activate(dt, dt_strides[0], tokens, seqlen - start, bias, head, SOFTPLUS)
    gradient = tl.where(inside & (activated >= low) & (activated <= high), gradient, 0.0)
    if SOFTPLUS:
        gradient *= sigmoid(raw)
    ddt += (batch * seqlen + start) * h + head
    tl.store(ddt + tokens * h, gradient.to(ddt.dtype.element_ty), mask=inside)
    step = tl.where(inside, clamp(activated, low, high), 0.0)
    shares += (batch * spans + span) * (2 * h) + head
    tl.store(shares, tl.sum(tl.sum(step * da, axis=1), axis=0))
    tl.store(shares + h, tl.sum(tl.sum(gradient, axis=1), axis=0))
