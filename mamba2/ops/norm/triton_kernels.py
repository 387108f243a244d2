"""Root-mean-square norms, forward and backward: of a sum with the residual stream, and gated.

A row is one token's channels, or one group of them; w is its width. With r = 1 / sqrt(mean(u²) + eps):

    add      u = residual + x                    y = weight u r
    gated    u = x silu(z)                       y = weight u r               gate G = 1
             or u = x                            y = weight u r silu(z)       gate G = silu(z)

and backward, with v = weight dy G:

    du = r v - u r³ mean(v u)        dweight = Σ_rows dy G u r
    add      dx = dresidual = du + dstream
    gated    dx = du silu(z),  dz = du x silu'(z)          or   dx = du,  dz = weight dy u r silu'(z)

Grid (groups * row tiles). A program owns ROWS rows at a time of one group, whole, in registers; the groups of a token
are neighbours in the grid. In the backward it goes through several such tiles, so that few rows of partial sums of
dweight are left for `triton_reduce`. r is recomputed: the row is there, and its sum of squares is taken beside that of
v u. Nothing is kept for the backward but the inputs; of add_rms_norm only the sum, which the next block has anyway.

Bytes per token, 16-bit activations, float32 stream: add 12 d forward, 16 d backward; gated 6 d forward, 10 d backward.
"""

import triton
import triton.language as tl

from mamba2.ops.triton_math import sigmoid, silu


@triton.jit
def _load_rows(pointer, first, rows, stride, column_stride, columns, mask):
    """(ROWS, COLUMNS) from row `first` on, float32, zero outside the mask. Column offsets are in int64: so may be a
    stride of theirs."""
    pointer += first.to(tl.int64) * stride
    offsets = rows.to(tl.int64)[:, None] * stride + columns.to(tl.int64)[None, :] * column_stride
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(pointer, value, first, rows, stride: tl.constexpr, columns, mask):
    pointer += first.to(tl.int64) * stride
    tl.store(pointer + rows[:, None] * stride + columns[None, :], value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _reciprocal_rms(u, eps, width: tl.constexpr):
    return tl.rsqrt(tl.sum(u * u, axis=1) * (1.0 / width) + eps)[:, None]


@triton.jit
def _norm_gradient(u, v, r, width: tl.constexpr):
    """Gradient of u in Σ v · (u r), where r is the reciprocal root mean square of u's rows."""
    projection = tl.sum(u * v, axis=1)[:, None] * (1.0 / width)
    return r * (v - u * (projection * r * r))


@triton.jit
def _add_forward_kernel(
    x,  # (rows, d)
    residual,  # (rows, d) or None
    weight,  # (d)
    normed,  # out: (rows, d), contiguous
    stream,  # out: (rows, d), contiguous; unused without a residual, when the stream is x
    x_strides,
    residual_strides,
    weight_stride,
    count,
    eps,
    d: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Grid (row tiles)."""
    first = tl.program_id(0) * ROWS
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    mask = (rows[:, None] < count - first) & (columns[None, :] < d)
    u = _load_rows(x, first, rows, x_strides[0] // ALIGN * ALIGN, x_strides[1], columns, mask)
    if residual is not None:
        row_stride = residual_strides[0] // ALIGN * ALIGN
        u = u.to(stream.dtype.element_ty).to(tl.float32)
        u += _load_rows(residual, first, rows, row_stride, residual_strides[1], columns, mask)
        # A narrow stream is normalised as it is stored.
        u = u.to(stream.dtype.element_ty).to(tl.float32)
        _store_rows(stream, u, first, rows, d, columns, mask)
    w = tl.load(weight + columns * weight_stride, mask=columns < d, other=0.0).to(tl.float32)
    _store_rows(normed, u * _reciprocal_rms(u, eps, d) * w[None, :], first, rows, d, columns, mask)


@triton.jit
def _add_backward_kernel(
    dnormed,  # (rows, d)
    dstream,  # (rows, d) or None
    stream,  # (rows, d)
    weight,  # (d)
    dx,  # out: (rows, d), contiguous
    dresidual,  # out: (rows, d), contiguous, or None where dx serves for both
    partial,  # out: (programs, d), float32
    dnormed_strides,
    dstream_strides,
    stream_strides,
    weight_stride,
    count,
    eps,
    tiles,  # row tiles per program
    d: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Grid (programs)."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    w = tl.load(weight + columns * weight_stride, mask=columns < d, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    begin = tl.program_id(0) * tiles * ROWS
    for first in range(begin, tl.minimum(begin + tiles * ROWS, count), ROWS):
        mask = (rows[:, None] < count - first) & (columns[None, :] < d)
        u = _load_rows(stream, first, rows, stream_strides[0] // ALIGN * ALIGN, stream_strides[1], columns, mask)
        dy = _load_rows(dnormed, first, rows, dnormed_strides[0] // ALIGN * ALIGN, dnormed_strides[1], columns, mask)
        r = _reciprocal_rms(u, eps, d)
        du = _norm_gradient(u, dy * w[None, :], r, d)
        dweight += dy * (u * r)
        if dstream is not None:
            row_stride = dstream_strides[0] // ALIGN * ALIGN
            du += _load_rows(dstream, first, rows, row_stride, dstream_strides[1], columns, mask)
        _store_rows(dx, du, first, rows, d, columns, mask)
        if dresidual is not None:
            _store_rows(dresidual, du, first, rows, d, columns, mask)
    partial += tl.program_id(0).to(tl.int64) * d
    tl.store(partial + columns, tl.sum(dweight, axis=0), mask=columns < d)


@triton.jit
def _gated_forward_kernel(
    x,  # (rows, groups * width)
    z,  # (rows, groups * width)
    weight,  # (groups * width)
    y,  # out: (rows, groups * width), contiguous
    x_strides,
    z_strides,
    weight_stride,
    count,
    eps,
    width: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Grid (groups * row tiles), group fastest."""
    first = tl.program_id(0) // GROUPS * ROWS
    rows = tl.arange(0, ROWS)
    inside = tl.arange(0, COLUMNS)
    columns = tl.program_id(0) % GROUPS * width + inside
    mask = (rows[:, None] < count - first) & (inside[None, :] < width)
    u = _load_rows(x, first, rows, x_strides[0] // ALIGN * ALIGN, x_strides[1], columns, mask)
    gate = silu(_load_rows(z, first, rows, z_strides[0] // ALIGN * ALIGN, z_strides[1], columns, mask))
    w = tl.load(weight + columns * weight_stride, mask=inside < width, other=0.0).to(tl.float32)
    if not NORM_FIRST:
        u *= gate
    result = u * _reciprocal_rms(u, eps, width) * w[None, :]
    if NORM_FIRST:
        result *= gate
    _store_rows(y, result, first, rows, GROUPS * width, columns, mask)


@triton.jit
def _gated_backward_kernel(
    dy,  # (rows, groups * width)
    x,  # (rows, groups * width)
    z,  # (rows, groups * width)
    weight,  # (groups * width)
    dx,  # out: (rows, groups * width), contiguous
    dz,  # out: (rows, groups * width), contiguous
    partial,  # out: (programs / groups, groups * width), float32
    dy_strides,
    x_strides,
    z_strides,
    weight_stride,
    count,
    eps,
    tiles,  # row tiles per program
    width: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Grid (groups * programs per group), group fastest."""
    rows = tl.arange(0, ROWS)
    inside = tl.arange(0, COLUMNS)
    columns = tl.program_id(0) % GROUPS * width + inside
    w = tl.load(weight + columns * weight_stride, mask=inside < width, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    begin = tl.program_id(0) // GROUPS * tiles * ROWS
    for first in range(begin, tl.minimum(begin + tiles * ROWS, count), ROWS):
        mask = (rows[:, None] < count - first) & (inside[None, :] < width)
        x_tile = _load_rows(x, first, rows, x_strides[0] // ALIGN * ALIGN, x_strides[1], columns, mask)
        z_tile = _load_rows(z, first, rows, z_strides[0] // ALIGN * ALIGN, z_strides[1], columns, mask)
        gradient = _load_rows(dy, first, rows, dy_strides[0] // ALIGN * ALIGN, dy_strides[1], columns, mask)
        s = sigmoid(z_tile)
        gate = z_tile * s
        slope = s * (1.0 + z_tile * (1.0 - s))
        u = x_tile
        through = gradient  # dy G
        if NORM_FIRST:
            through *= gate
        else:
            u *= gate
        r = _reciprocal_rms(u, eps, width)
        du = _norm_gradient(u, through * w[None, :], r, width)
        dweight += through * (u * r)
        if NORM_FIRST:
            dz_tile = gradient * w[None, :] * (u * r) * slope
        else:
            dz_tile = du * x_tile * slope
            du *= gate
        _store_rows(dx, du, first, rows, GROUPS * width, columns, mask)
        _store_rows(dz, dz_tile, first, rows, GROUPS * width, columns, mask)
    partial += (tl.program_id(0) // GROUPS).to(tl.int64) * (GROUPS * width)
    tl.store(partial + columns, tl.sum(dweight, axis=0), mask=inside < width)
