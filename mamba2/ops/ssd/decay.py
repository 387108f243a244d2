"""The decay factors of the chunked SSD kernels, and their gradient. To change how the state decays, begin here.

    step_i   = clamp(softplus(dt_i + bias), low, high)        a_i = step_i A
    cs_i     = log2(e) Σ_{j<=i} a_j       from the beginning of i's chunk of Q tokens: longer sums would lose digits
    source_j = cs_j - log2(step_j)        so that multiplying by the step is free; for Q = 16 (float32 input) step_j
                                          itself, because the difference would lose a digit

and the decay factors within a chunk, between and out_of times step_j if WRITTEN:

    between   from the write of token j to token i >= j            exp2(cs_i - cs_j)
    into      from the state before the chunk to token i           exp2(cs_i)
    out_of    from the write of token j to the state after         exp2(cs_last - cs_j)
    through   from the state before the chunk to the one after     exp2(cs_last)

Factors across a document boundary are set to 0 by `where`, never by a product, so that inf * 0 cannot occur. `first_i`
and `last_i` are the positions in the chunk of the first and last token of i's document: -1 and Q if it goes on outside.

Gradient. Let W_ij, s_i, w_j and X be the gradients of the loss with respect to the logarithms of between(i, j),
into(i), out_of(j) and through. Then

    da_k = Σ_{j<k<=i} W_ij + Σ_{i>=k} s_i + Σ_{j<k} w_j + X        dA = Σ_k step_k da_k

over a span of two chunks, at whose ends the backward pass has the states.

`_decays_kernel` writes cs, source, first and last; the other kernels read them through the functions here;
`_decays_gradient_kernel` computes ddt, and shares of dA, dD and d(dt_bias), from the `Sums` that those wrote.
"""

from typing import Any, NamedTuple

from mamba2.ops.kernel import LOG2E, sigmoid, softplus
from mamba2.ops.language import tl, triton
from mamba2.ops.ssd.tiles import at


class Activation(NamedTuple):
    """From dt to the step, and the rate at which it decays the state."""

    dt: Any  # View (b, l, h)
    A: Any  # (h,)
    bias: Any  # (h,) or None
    low: float
    high: float
    SOFTPLUS: tl.constexpr


class Decays(NamedTuple):
    """Workspaces, contiguous."""

    cs: Any  # (b, h, l), float32
    source: Any  # (b, h, l), float32
    first: Any  # (b, l), int32, or None without documents
    last: Any  # (b, l), int32, or None without documents


class Sums(NamedTuple):
    """Inputs of `_decays_gradient_kernel`, float32; a span is two chunks, and states are kept only between spans."""

    rows: Any  # (b, h, l): Σ_{j<i} W_ij + s_i, j in i's chunk or, in the second of a span, in both
    columns: Any  # (b, h, l): Σ_{i>j} W_ij, i in j's chunk
    w: Any  # (b, h, l): w_j, and in the first chunk of a span Σ W_ij, i in the second
    state: Any  # (b, h, l): s_i in the second chunk, w_j in the first: what flows across the other one
    X: Any  # (b, h, spans)
    ux: Any  # (p tiles, b, h, l): u_j·x_j, the gradient of step_j apart from the decay
    dD: Any  # (p tiles, b, h, l): dout_j·x_j, or None without D


@triton.jit
def activate(activation, batch, head, start, tokens, seqlen):
    """dt + bias before and after softplus, and the step, 0 past the end; float32, of `tokens` from `start` on."""
    dt = at(activation.dt, batch, start, head)
    inside = tokens < seqlen - start
    raw = tl.load(dt + tokens.to(tl.int64) * activation.dt.strides[0], mask=inside, other=0.0).to(tl.float32)
    if activation.bias is not None:
        raw += tl.load(activation.bias + head).to(tl.float32)
    smooth = raw
    if activation.SOFTPLUS:
        smooth = softplus(raw)
    # Comparisons, so that a NaN stays NaN.
    step = tl.where(
        smooth < activation.low, activation.low, tl.where(smooth > activation.high, activation.high, smooth)
    )
    return raw, smooth, tl.where(inside, step, 0.0)


@triton.jit
def _decays_kernel(activation, decays, seq_idx, seqlen, h: tl.constexpr, Q: tl.constexpr, CHUNKS: tl.constexpr):
    """Grid (chunks / CHUNKS, h, b). Bytes per token, 16-bit dt: 2 h read, 8 h written; with documents 8 more each."""
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * (CHUNKS * Q)
    tokens = tl.arange(0, CHUNKS * Q)
    inside = tokens < seqlen - start
    _, _, step = activate(activation, batch, head, start, tokens, seqlen)
    rate = tl.load(activation.A + head).to(tl.float32) * LOG2E
    here = (batch * h + head) * seqlen + start + tokens
    cs = tl.reshape(tl.cumsum(tl.reshape(step * rate, (CHUNKS, Q)), axis=1), (CHUNKS * Q,))
    tl.store(decays.cs + here, cs, mask=inside)
    source = step if Q == 16 else cs - tl.log2(tl.where(inside, step, 1.0))
    tl.store(decays.source + here, source, mask=inside)
    if decays.first is not None:  # noqa: SIM102 (the outer condition is known at compile time)
        if head == 0:
            to_first = at(seq_idx, batch, start, 0)
            offsets = tokens.to(tl.int64) * seq_idx.strides[0]
            value = tl.load(to_first + offsets, mask=inside, other=0)
            follows = inside & (start + tokens > 0)
            before = tl.load(to_first + offsets - seq_idx.strides[0], mask=follows, other=0)
            continues = inside & (start + tokens < seqlen - 1)
            after = tl.load(to_first + offsets + seq_idx.strides[0], mask=continues, other=0)
            first = tl.where(follows & (value != before), tokens % Q, -1)
            last = tl.where(continues & (value != after), tokens % Q, Q)
            first = tl.reshape(tl.associative_scan(tl.reshape(first, (CHUNKS, Q)), 1, _later), (CHUNKS * Q,))
            last = tl.associative_scan(tl.reshape(last, (CHUNKS, Q)), 1, _earlier, reverse=True)
            tl.store(decays.first + batch * seqlen + start + tokens, first, mask=inside)
            tl.store(decays.last + batch * seqlen + start + tokens, tl.reshape(last, (CHUNKS * Q,)), mask=inside)


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def _earlier(a, b):
    return tl.minimum(a, b)


@triton.jit
def load_decays(decays, batch, head, start, seqlen, Z):
    """The tuple d of a chunk: 0 cs, 1 source, 2 cs of its last token, 3 first, 4 last, 5 and 6 position and first of
    its last token. Tokens past the end of the sequence have the values of the last one.
    """
    end = tl.minimum(start + Z.Q, seqlen) - 1
    tokens = tl.minimum(start + tl.arange(0, Z.Q), end)
    row = (batch * Z.h + head) * seqlen
    cs = tl.load(decays.cs + row + tokens)
    source = tl.load(decays.source + row + tokens)
    cs_last = tl.load(decays.cs + row + end)
    first, last, first_of_end = tokens, tokens, end
    if decays.first is not None:
        first = tl.load(decays.first + batch * seqlen + tokens)
        last = tl.load(decays.last + batch * seqlen + tokens)
        first_of_end = tl.load(decays.first + batch * seqlen + end)
    return cs, source, cs_last, first, last, end - start, first_of_end


@triton.jit
def between(d, WRITTEN: tl.constexpr, TRANSPOSED: tl.constexpr, DOCUMENTS: tl.constexpr):
    """(i, j), or transposed (j, i): zero where i is before j or in another document. WRITTEN: times step_j."""
    EXACT: tl.constexpr = d[0].shape[0] == 16
    place = tl.arange(0, d[0].shape[0])
    level = d[1] if WRITTEN and not EXACT else d[0]
    if TRANSPOSED:
        difference = d[0][None, :] - level[:, None]
        visible = place[None, :] >= place[:, None]
        if DOCUMENTS:
            visible = visible & (place[None, :] <= d[4][:, None])
    else:
        difference = d[0][:, None] - level[None, :]
        visible = place[:, None] >= place[None, :]
        if DOCUMENTS:
            visible = visible & (place[None, :] >= d[3][:, None])
    factor = tl.exp2(tl.where(visible, difference, float("-inf")))
    if WRITTEN and EXACT:
        factor *= d[1][:, None] if TRANSPOSED else d[1][None, :]
    return factor


@triton.jit
def into(d, DOCUMENTS: tl.constexpr):
    """(i,): 0 where the document of token i begins in the chunk."""
    factor = tl.exp2(d[0])
    if DOCUMENTS:
        factor = tl.where(d[3] < 0, factor, 0.0)
    return factor


@triton.jit
def out_of(d, WRITTEN: tl.constexpr, DOCUMENTS: tl.constexpr):
    """(j,): 0 where the document of token j ends before the chunk's last token. WRITTEN: times step_j."""
    EXACT: tl.constexpr = d[0].shape[0] == 16
    factor = tl.exp2(d[2] - (d[1] if WRITTEN and not EXACT else d[0]))
    if WRITTEN and EXACT:
        factor *= d[1]
    if DOCUMENTS:
        factor = tl.where(d[4] >= d[5], factor, 0.0)
    return factor


@triton.jit
def through(d, DOCUMENTS: tl.constexpr):
    """A number: 0 where a document begins in the chunk."""
    factor = tl.exp2(d[2])
    if DOCUMENTS:
        factor = tl.where(d[6] < 0, factor, 0.0)
    return factor


@triton.jit
def step_of(d):
    """(j,)"""
    return d[1] if d[0].shape[0] == 16 else tl.exp2(d[0] - d[1])


@triton.jit
def _decays_gradient_kernel(
    activation,
    sums,
    ddt,  # out: (b, l, h), contiguous
    shares,  # out: (b, blocks, 2 h), float32: dA, d(dt_bias)
    dD_shares,  # out: (b, blocks, h), float32, or None
    plane,  # b h l
    seqlen,
    h: tl.constexpr,
    Q: tl.constexpr,
    CHUNKS: tl.constexpr,
    P_TILES: tl.constexpr,
):
    """Grid (blocks of CHUNKS chunks, h, b). W_ij with i, j >= k cancel in the sum over rows - columns from k on.

    Bytes per token, 16-bit dt: sums 16 h + 8 h p tiles, dt and ddt 4 h.
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * (CHUNKS * Q)
    tokens = tl.arange(0, CHUNKS * Q)
    inside = tokens < seqlen - start
    sequence = batch * h + head
    here = sequence * seqlen + start + tokens
    after = tl.load(sums.rows + here, mask=inside, other=0.0) - tl.load(sums.columns + here, mask=inside, other=0.0)
    before = tl.load(sums.w + here, mask=inside, other=0.0)
    gradient = tl.zeros((CHUNKS * Q,), dtype=tl.float32)
    dD = tl.zeros((CHUNKS * Q,), dtype=tl.float32)
    for tile in tl.static_range(P_TILES):
        to_tile = tl.cast(plane, tl.int64) * tile + here
        gradient += tl.load(sums.ux + to_tile, mask=inside, other=0.0)
        if sums.dD is not None:
            dD += tl.load(sums.dD + to_tile, mask=inside, other=0.0)
    # Decay through a whole chunk: X of the span, and s or w of the span's other chunk (`Sums.state`).
    spans = tl.cdiv(tl.cdiv(seqlen, Q), 2)
    span = tl.program_id(0) * (CHUNKS // 2) + tl.arange(0, CHUNKS // 2)
    X = tl.load(sums.X + sequence * spans + span, mask=span < spans, other=0.0)
    state = tl.sum(tl.reshape(tl.load(sums.state + here, mask=inside, other=0.0), (CHUNKS // 2, 2, Q)), axis=2)
    across = X[:, None] + tl.sum(state, axis=1)[:, None] - state
    before = tl.reshape(before, (CHUNKS, Q))
    da = tl.cumsum(tl.reshape(after, (CHUNKS, Q)), axis=1, reverse=True) + tl.reshape(across, (CHUNKS,))[:, None]
    da = tl.reshape(da + tl.cumsum(before, axis=1) - before, (CHUNKS * Q,))
    gradient += da * tl.load(activation.A + head).to(tl.float32)

    raw, smooth, step = activate(activation, batch, head, start, tokens, seqlen)
    gradient = tl.where(inside & (smooth >= activation.low) & (smooth <= activation.high), gradient, 0.0)
    if activation.SOFTPLUS:
        gradient *= sigmoid(raw)
    tl.store(ddt + (batch * seqlen + start + tokens) * h + head, gradient.to(ddt.dtype.element_ty), mask=inside)
    block = batch * tl.num_programs(0) + tl.program_id(0)
    tl.store(shares + block * (2 * h) + head, tl.sum(step * da, axis=0))
    tl.store(shares + block * (2 * h) + h + head, tl.sum(gradient, axis=0))
    if dD_shares is not None:
        tl.store(dD_shares + block * h + head, tl.sum(dD, axis=0))
