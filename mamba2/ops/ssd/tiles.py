"""Helpers of the SSD kernels: views and sizes passed as tuples, loads and stores of tiles, matrix products.

A tile of B, C or of a state is a pair of tiles over d_state, of N1 and N2 columns, so that 142 costs 128 + 16 and not
256. N2 is 0 where one tile is enough: the second of a pair is then the first again, and not used.

All strides but that of the batch are compile-time constants: offsets within a tile then take no registers for strides.
Offsets that grow with batch or length are int64; inside a tile they are int32 where that is enough.
"""

import functools
from typing import Any, NamedTuple

import torch

from mamba2.ops.kernel import constant
from mamba2.ops.language import tl, triton


class View(NamedTuple):
    """A tensor as a kernel argument."""

    pointer: Any
    batch: int  # stride of the first dimension
    strides: tl.constexpr  # of the others: over tokens, heads or groups, channels; of a state over heads, p, n


class Sizes(NamedTuple):
    """Compile-time parameters of a kernel, as one `tl.constexpr`: Triton inspects each argument at every launch."""

    h: int  # nheads
    p: int  # headdim
    n: int  # d_state
    R: int  # heads per group
    Q: int  # tokens of a chunk
    P: int  # channels of a tile
    N1: int
    N2: int
    PRECISION: str  # how float32 operands are multiplied; 16-bit ones are exact
    TRANSPOSED: bool = False  # whether products are computed as their transposes


def view(tensor: torch.Tensor | None) -> View | None:
    return None if tensor is None else View(tensor, tensor.stride(0), constant(tensor.stride()[1:]))


@functools.cache
def n_tiles(n: int) -> tuple[int, int]:
    """d_state as two tiles (N1, N2), powers of two of at least 16; N2 is 0 where one is as good. 142 -> 128, 16."""
    whole = max(16, triton.next_power_of_2(n))
    first = max(16, whole // 2)
    if n <= first:
        return first, 0
    second = max(16, triton.next_power_of_2(n - first))
    return (first, second) if second < first else (whole, 0)


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
def at(v, batch, token, head):
    """Pointer to a token of a head (or group) in the view of a tensor (b, l, h, p)."""
    return v.pointer + batch * v.batch + tl.cast(token, tl.int64) * v.strides[0] + head * v.strides[1]


@triton.jit
def load_head(v, batch, start, seqlen, head, columns, Z):
    """Q tokens of a head from `start` on, (Q, P)."""
    here = at(v, batch, start, head)
    return load_tile(here, tl.arange(0, Z.Q), seqlen - start, columns, Z.p, v.strides[0], v.strides[2])


@triton.jit
def load_rows(k, batch, start, seqlen, group, Z):
    """Q tokens of B or C from `start` on: the pair (Q, N1), (Q, N2)."""
    rows = tl.arange(0, Z.Q)
    here = at(k, batch, start, group)
    k1 = load_tile(here, rows, seqlen - start, tl.arange(0, Z.N1), Z.n, k.strides[0], k.strides[2])
    k2 = k1
    if Z.N2 > 0:
        k2 = load_tile(here, rows, seqlen - start, tl.arange(0, Z.N2) + Z.N1, Z.n, k.strides[0], k.strides[2])
    return k1, k2


@triton.jit
def load_kept(kept, columns, n, Z):
    """A state kept as (n, p), contiguous: the pair (N1, P), (N2, P); zero, and nothing read, with n = 0."""
    state1 = load_tile(kept, tl.arange(0, Z.N1), n, columns, Z.p, Z.p, 1)
    state2 = state1
    if Z.N2 > 0:
        state2 = load_tile(kept + Z.N1 * Z.p, tl.arange(0, Z.N2), n - Z.N1, columns, Z.p, Z.p, 1)
    return state1, state2


@triton.jit
def store_kept(kept, state1, state2, columns, n, Z):
    """The counterpart of `load_kept`; with n = 0 nothing is written."""
    store_tile(kept, tl.arange(0, Z.N1), n, columns, Z.p, Z.p, state1)
    if Z.N2 > 0:
        store_tile(kept + Z.N1 * Z.p, tl.arange(0, Z.N2), n - Z.N1, columns, Z.p, Z.p, state2)


@triton.jit
def load_state(given, columns, strides: tl.constexpr, Z):
    """A state (p, n) of a view (b, segments, h, p, n), as the pair (N1, P), (N2, P) in float32."""
    state1 = load_tile(given, tl.arange(0, Z.N1), Z.n, columns, Z.p, strides[3], strides[2]).to(tl.float32)
    state2 = state1
    if Z.N2 > 0:
        more = given + Z.N1 * strides[3]
        state2 = load_tile(more, tl.arange(0, Z.N2), Z.n - Z.N1, columns, Z.p, strides[3], strides[2]).to(tl.float32)
    return state1, state2


@triton.jit
def store_state(given, state1, state2, columns, n, Z):
    """The counterpart of `load_state` for (p, n) contiguous; with n = 0 nothing is written."""
    rows = tl.arange(0, Z.N1)
    mask = (rows[:, None] < n) & (columns[None, :] < Z.p)
    tl.store(given + columns[None, :] * Z.n + rows[:, None], state1, mask=mask)
    if Z.N2 > 0:
        rows2 = tl.arange(0, Z.N2) + Z.N1
        mask2 = (rows2[:, None] < n) & (columns[None, :] < Z.p)
        tl.store(given + columns[None, :] * Z.n + rows2[:, None], state2, mask=mask2)


@triton.jit
def zero_state(Z):
    """The pair (N1, P), (N2, P), float32."""
    state1 = tl.full((Z.N1, Z.P), 0.0, dtype=tl.float32)
    state2 = state1
    if Z.N2 > 0:
        state2 = tl.full((Z.N2, Z.P), 0.0, dtype=tl.float32)
    return state1, state2


@triton.jit
def dot(a, b, acc, Z):
    """a @ b + acc in float32; if TRANSPOSED, computed as bᵀ aᵀ + accᵀ, whose rows, split among warps, are channels."""
    if Z.TRANSPOSED:
        turned = None if acc is None else tl.trans(acc)
        product = tl.trans(tl.dot(tl.trans(b), tl.trans(a), acc=turned, input_precision=Z.PRECISION))
    else:
        product = tl.dot(a, b, acc=acc, input_precision=Z.PRECISION)
    return product


@triton.jit
def dot_rows(a, b, Z):
    """a_i·b_j of rows of B or C, (Q, Q)."""
    products = dot(a[0], tl.trans(b[0]), None, Z)
    if Z.N2 > 0:
        products = dot(a[1], tl.trans(b[1]), products, Z)
    return products


@triton.jit
def dot_state(k, state1, state2, Z):
    """Rows of B or C times a state, (Q, P)."""
    product = dot(k[0], state1, None, Z)
    if Z.N2 > 0:
        product = dot(k[1], state2, product, Z)
    return product


@triton.jit
def add_outer(state1, state2, k, value, factor, Z):
    """factor * state + Σ_j k_j value_jᵀ."""
    state1 = dot(tl.trans(k[0]), value, state1 * factor, Z)
    if Z.N2 > 0:
        state2 = dot(tl.trans(k[1]), value, state2 * factor, Z)
    return state1, state2
