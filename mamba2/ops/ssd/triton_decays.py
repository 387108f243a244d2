"""Decays: dt after its activation, and its cumulative sums, which every other kernel of the op reads.

    step = clamp(softplus(dt + bias), low, high)
    cs_i   = log2(e) A Σ_{j<=i} step_j       from the beginning of i's chunk
    ends_c = Σ_{c'<=c} cs_last(c')           over chunks, from the beginning of c's span

Sums begin anew in each chunk of Q tokens so that differences of near tokens keep their digits: where steps are large, a
sum over a whole span has lost as many as it has grown. All are float32 and ordered (b, h, l), so that a head's chunk is
one contiguous read. With `seq_idx`, also the number of the document that a token belongs to, counted from the beginning
of its span. Grid (spans, h, b).

Bytes per token, 16-bit dt: 2 h read, 8 h + 4 h / Q written.
"""

import triton
import triton.language as tl

from mamba2.ops.triton_math import LOG2E, softplus


@triton.jit
def activate(dt, stride: tl.constexpr, tokens, left, bias, head, SOFTPLUS: tl.constexpr):
    """dt before and after softplus, float32; `bias` is a pointer or None."""
    raw = tl.load(dt + tokens.to(tl.int64) * stride, mask=tokens < left, other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + head).to(tl.float32)
    if SOFTPLUS:
        return raw, softplus(raw)
    else:
        return raw, raw


@triton.jit
def clamp(step, low, high):
    """Between the two; a NaN stays one."""
    return tl.where(step < low, low, tl.where(step > high, high, step))


@triton.jit
def _decays_kernel(
    dt,  # (b, l, h)
    A,  # (h)
    bias,  # (h) or None
    seq_idx,  # (b, l) or None
    steps,  # out: (b, h, l), float32
    cs,  # out: (b, h, l), float32
    ends,  # out: (b, h, chunks), float32
    document,  # out: (b, l), int32, or None
    batch_strides,  # of dt, seq_idx
    seqlen,
    low,
    high,
    dt_strides: tl.constexpr,
    seq_strides: tl.constexpr,
    h: tl.constexpr,
    SPAN_CHUNKS: tl.constexpr,
    Q: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    SPAN: tl.constexpr = SPAN_CHUNKS * Q
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * SPAN
    offset = tl.cast(start, tl.int64)
    left = seqlen - start
    tokens = tl.arange(0, SPAN)
    dt += batch * batch_strides[0] + head * dt_strides[1] + offset * dt_strides[0]
    _, step = activate(dt, dt_strides[0], tokens, left, bias, head, SOFTPLUS)
    step = tl.where(tokens < left, clamp(step, low, high), 0.0)
    rate = tl.load(A + head).to(tl.float32) * LOG2E
    here = (batch * h + head) * seqlen + start + tokens
    tl.store(steps + here, step, mask=tokens < left)
    chunked = tl.reshape(step * rate, (SPAN_CHUNKS, Q))
    tl.store(cs + here, tl.reshape(tl.cumsum(chunked, axis=1), (SPAN,)), mask=tokens < left)
    chunks = tl.cdiv(seqlen, Q)
    chunk = tl.program_id(0) * SPAN_CHUNKS + tl.arange(0, SPAN_CHUNKS)
    end = tl.cumsum(tl.sum(chunked, axis=1), axis=0)
    tl.store(ends + (batch * h + head) * chunks + chunk, end, mask=chunk < chunks)
    if seq_idx is not None:
        seq_idx += batch * batch_strides[1] + offset * seq_strides[0]
        value = tl.load(seq_idx + tokens.to(tl.int64) * seq_strides[0], mask=tokens < left, other=0)
        # A change at the span's first token counts: it parts the token from the state that enters.
        follows = (tokens < left) & (tokens + start > 0)
        before = tl.load(seq_idx + (tokens.to(tl.int64) - 1) * seq_strides[0], mask=follows, other=0)
        number = tl.cumsum((follows & (value != before)).to(tl.int32), axis=0)
        tl.store(document + batch * seqlen + start + tokens, number, mask=(tokens < left) & (head == 0))
