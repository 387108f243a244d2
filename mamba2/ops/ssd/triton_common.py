"""What the SSD kernels share: loads and stores of tiles, decays, dots. Each is written once, here.

Names: Q tokens per chunk, p headdim, n d_state; a span is the run of chunks between two kept states. The n dimension
is held as two tiles, of N1 and N2 columns, so that d_state 142 costs 128 + 16 and not 256; N2 is 0 where one tile
covers it, and second tiles are then never touched. Exponentials are base 2: `cs` below comes multiplied by log2(e).

Strides inside a batch row are compile-time constants: the addresses of a tile then differ by numbers, not by registers.
Offsets that grow with batch or length are int64; inside a tile they are int32 where that is enough.
"""

import triton
import triton.language as tl


@triton.jit
def tile_offsets(rows, columns, width: tl.constexpr, row_stride: tl.constexpr, column_stride: tl.constexpr):
    """Offsets inside a tile, int32 unless one could pass 2**31."""
    if rows.shape[0] * row_stride + width * column_stride >= 2**31:
        return rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    else:
        return rows[:, None] * row_stride + columns[None, :] * column_stride


@triton.jit
def load_tile(pointer, rows, left, columns, width: tl.constexpr, row_stride: tl.constexpr, column_stride: tl.constexpr):
    """(rows, columns) of a matrix with `left` rows and `width` columns; zero outside."""
    mask = (rows[:, None] < left) & (columns[None, :] < width)
    return tl.load(pointer + tile_offsets(rows, columns, width, row_stride, column_stride), mask=mask, other=0.0)


@triton.jit
def store_tile(pointer, rows, left, columns, width: tl.constexpr, row_stride: tl.constexpr, value):
    """The counterpart of `load_tile` for contiguous columns, in the pointer's dtype."""
    mask = (rows[:, None] < left) & (columns[None, :] < width)
    offsets = tile_offsets(rows, columns, width, row_stride, 1)
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_head(v, start, seqlen, columns, strides: tl.constexpr, p: tl.constexpr, Q: tl.constexpr):
    """Q tokens of one head from `start` on, (Q, P_TILE); the pointer is to the head's first token."""
    here = v + tl.cast(start, tl.int64) * strides[0]
    return load_tile(here, tl.arange(0, Q), seqlen - start, columns, p, strides[0], strides[2])


@triton.jit
def load_rows(k, start, seqlen, strides: tl.constexpr, n: tl.constexpr, Q, N1: tl.constexpr, N2: tl.constexpr):
    """Q tokens of B or C from `start` on, (Q, N1) and (Q, N2); the pointer is to the group's first token."""
    rows = tl.arange(0, Q)
    k += tl.cast(start, tl.int64) * strides[0]
    k1 = load_tile(k, rows, seqlen - start, tl.arange(0, N1), n, strides[0], strides[2])
    k2 = k1
    if N2 > 0:
        k2 = load_tile(k, rows, seqlen - start, N1 + tl.arange(0, N2), n, strides[0], strides[2])
    return k1, k2


@triton.jit
def load_steps(steps, start, seqlen, Q: tl.constexpr):
    """dt of a chunk's tokens after its activation; the pointer is to the sequence's first token."""
    tokens = start + tl.arange(0, Q)
    return tl.load(steps + tokens, mask=tokens < seqlen, other=0.0)


@triton.jit
def load_chunk_decays(cs, document, start, seqlen, Q: tl.constexpr, SPAN: tl.constexpr):
    """What a chunk needs of its decays, as `_decays_kernel` wrote them; pointers to the sequence's first token.

    Returns, for each token i, cs_i, the number of its document, and the factors with which the state before the chunk
    reaches it, it reaches the state after the chunk, and one state the other. A document boundary is an infinite
    decay, made by `where` and never by a product: nothing is ever inf * 0.
    """
    rows = tl.arange(0, Q)
    inside = start + rows < seqlen
    end = tl.minimum(start + Q, seqlen) - 1
    decay = tl.load(cs + start + rows, mask=inside, other=0.0)
    last = tl.load(cs + end)
    into = tl.exp2(decay)
    out = tl.exp2(tl.minimum(last - decay, 0.0))
    through = tl.exp2(last)
    number = tl.zeros_like(rows)
    if document is not None:
        number = tl.load(document + start + rows, mask=inside, other=0)
        first = tl.load(document + start - 1, mask=start % SPAN != 0, other=0)  # of the token before, in this span
        final = tl.load(document + end)
        into = tl.where(number == first, into, 0.0)
        out = tl.where(number == final, out, 0.0)
        through = tl.where(final == first, through, 0.0)
    return decay, number, into, out, through


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc in float32. PRECISION says how float32 operands are multiplied; 16-bit ones are exact."""
    return tl.dot(a, b, acc=acc, input_precision=PRECISION)


@triton.jit
def dot_rows(a1, a2, b1, b2, N2: tl.constexpr, PRECISION: tl.constexpr):
    """a_i·b_j of rows of B or C, (Q, Q)."""
    products = dot(a1, tl.trans(b1), None, PRECISION)
    if N2 > 0:
        products = dot(a2, tl.trans(b2), products, PRECISION)
    return products


@triton.jit
def dot_state(k1, k2, state1, state2, N2: tl.constexpr, PRECISION: tl.constexpr):
    """Rows of B or C times a state, (Q, P_TILE)."""
    product = dot(k1, state1, None, PRECISION)
    if N2 > 0:
        product = dot(k2, state2, product, PRECISION)
    return product


@triton.jit
def zero_state(P_TILE: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """(N1, P_TILE) and (N2, P_TILE), float32."""
    state1 = tl.zeros((N1, P_TILE), dtype=tl.float32)
    state2 = state1
    if N2 > 0:
        state2 = tl.zeros((N2, P_TILE), dtype=tl.float32)
    return state1, state2


@triton.jit
def add_outer(state1, state2, k1, k2, value, through, N2: tl.constexpr, PRECISION: tl.constexpr):
    """through * state + Σ_j k_j value_jᵀ, for both tiles."""
    state1 = dot(tl.trans(k1), value, state1 * through, PRECISION)
    if N2 > 0:
        state2 = dot(tl.trans(k2), value, state2 * through, PRECISION)
    return state1, state2


@triton.jit
def scaled(value, weight):
    """value_i * weight_i by row, in value's dtype."""
    return (value.to(tl.float32) * weight[:, None]).to(value.dtype)


@triton.jit
def load_kept(kept, columns, p: tl.constexpr, n, N1: tl.constexpr, N2: tl.constexpr):
    """A state kept as (n, p), contiguous, as its two tiles; zero, and nothing read, with n = 0."""
    state1 = load_tile(kept, tl.arange(0, N1), n, columns, p, p, 1)
    state2 = state1
    if N2 > 0:
        state2 = load_tile(kept + N1 * p, tl.arange(0, N2), n - N1, columns, p, p, 1)
    return state1, state2


@triton.jit
def keep(kept, state1, state2, columns, p: tl.constexpr, n, N1: tl.constexpr, N2: tl.constexpr):
    """The counterpart of `load_kept`; with n = 0 nothing is written."""
    store_tile(kept, tl.arange(0, N1), n, columns, p, p, state1)
    if N2 > 0:
        store_tile(kept + N1 * p, tl.arange(0, N2), n - N1, columns, p, p, state2)


@triton.jit
def span_states(span, spans, INITIAL: tl.constexpr, CARRY: tl.constexpr):
    """Whether a state enters the span, and a gradient of its state comes back; else they are zero, and not in memory.

    INITIAL, CARRY: whether the sequence begins with a state, and its last one has a gradient.
    """
    return span >= (0 if INITIAL else 1), span < (spans if CARRY else spans - 1)


@triton.jit
def load_given(given, columns, strides: tl.constexpr, p: tl.constexpr, n: tl.constexpr, N1: tl.constexpr, N2):
    """A caller's state, (p, n) with strides[1:], as its two tiles in float32."""
    state1 = load_tile(given, tl.arange(0, N1), n, columns, p, strides[2], strides[1]).to(tl.float32)
    state2 = state1
    if N2 > 0:
        given += N1 * strides[2]
        state2 = load_tile(given, tl.arange(0, N2), n - N1, columns, p, strides[2], strides[1]).to(tl.float32)
    return state1, state2


@triton.jit
def give(given, state1, state2, columns, p: tl.constexpr, n: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """Write a state as the caller has them, (p, n) contiguous."""
    rows = tl.arange(0, N1)
    mask = (rows[:, None] < n) & (columns[None, :] < p)
    tl.store(given + columns[None, :] * n + rows[:, None], state1, mask=mask)
    if N2 > 0:
        rows2 = N1 + tl.arange(0, N2)
        mask2 = (rows2[:, None] < n) & (columns[None, :] < p)
        tl.store(given + columns[None, :] * n + rows2[:, None], state2, mask=mask2)
