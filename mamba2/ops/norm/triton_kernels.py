"""Root-mean-square norms, forward and backward: of a sum with the residual stream, and gated.

A row is one token's channels, or one group of them; w is its width. With r = 1 / sqrt(mean(u²) + eps):

    add      u = residual + x                    y = weight u r
    gated    u = x silu(z)                       y = weight u r               gate G = 1
             or u = x                            y = weight u r silu(z)       gate G = silu(z)

and backward, with v = weight dy G:

    du = r v - u r³ mean(v u)        dweight = Σ_rows dy G u r
    add      dx = dresidual = du + dstream
    gated    dx = du silu(z),  dz = du x silu'(z)          or   dx = du,  dz = weight dy u r silu'(z)

Grid (groups * row tiles). A program owns ROWS rows at a time of one group, whole, in registers, as PIECES pieces of
COLUMNS columns (a tuple), so that a row of 5120 is not held as one of 8192; the groups of a token are neighbours in the
grid. In the backward it goes through several such tiles, so that few rows of partial sums of dweight are left for
`triton_reduce`. r is recomputed: the row is there, and its sum of squares is taken beside that of v u. Nothing is kept
for the backward but the inputs; of add_rms_norm only the sum, which the next block has anyway.

Bytes per token, 16-bit activations, float32 stream: add 12 d forward, 16 d backward; gated 6 d forward, 10 d backward.
"""

import triton
import triton.language as tl

from mamba2.ops.triton_math import aligned, sigmoid, silu


@triton.jit
def _mask(i: tl.constexpr, left, width: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of piece i: rows among the `left` ones to come, columns among the row's `width`."""
    return (tl.arange(0, ROWS)[:, None] < left) & ((i * COLUMNS + tl.arange(0, COLUMNS))[None, :] < width)


@triton.jit
def _load_rows(
    pointer,  # to the first row and column
    strides,
    left,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Pieces (ROWS, COLUMNS) of the rows, float32, zero outside."""
    rows = tl.arange(0, ROWS).to(tl.int64) * aligned(strides[0], ALIGN)
    result = ()
    for i in tl.static_range(PIECES):
        columns = (i * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64) * strides[1]
        mask = _mask(i, left, width, ROWS, COLUMNS)
        result += (tl.load(pointer + rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32),)
    return result


@triton.jit
def _store_piece(
    pointer,  # to the first row and column; rows are contiguous
    value,
    i: tl.constexpr,
    stride: tl.constexpr,
    left,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    offsets = tl.arange(0, ROWS)[:, None] * stride + (i * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = _mask(i, left, width, ROWS, COLUMNS)
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _load_weight(weight, stride, width: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    result = ()
    for i in tl.static_range(PIECES):
        columns = i * COLUMNS + tl.arange(0, COLUMNS)
        w = tl.load(weight + columns.to(tl.int64) * stride, mask=columns < width, other=0.0)
        result += (w.to(tl.float32)[None, :],)
    return result


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    result = ()
    for _ in tl.static_range(PIECES):
        result += (tl.zeros((ROWS, COLUMNS), dtype=tl.float32),)
    return result


@triton.jit
def _mean_product(a, b, width: tl.constexpr, PIECES: tl.constexpr):
    """Mean of a b over each row, (ROWS, 1)."""
    total = a[0] * b[0]
    for i in tl.static_range(1, PIECES):
        total += a[i] * b[i]
    return tl.sum(total, axis=1)[:, None] * (1.0 / width)


@triton.jit
def _store_sums(partial, dweight, width: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    for i in tl.static_range(PIECES):
        columns = i * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(partial + columns, tl.sum(dweight[i], axis=0), mask=columns < width)


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
    PIECES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Grid (row tiles)."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    left = count - first
    u = _load_rows(x + first * aligned(x_strides[0], ALIGN), x_strides, left, d, ROWS, COLUMNS, PIECES, ALIGN)
    w = _load_weight(weight, weight_stride, d, COLUMNS, PIECES)
    if residual is not None:
        residual += first * aligned(residual_strides[0], ALIGN)
        more = _load_rows(residual, residual_strides, left, d, ROWS, COLUMNS, PIECES, ALIGN)
        narrow = stream.dtype.element_ty
        total = ()
        for i in tl.static_range(PIECES):
            # Added and normalised in the stream's own precision.
            piece = (u[i].to(narrow).to(tl.float32) + more[i]).to(narrow)
            _store_piece(stream + first * d, piece, i, d, left, d, ROWS, COLUMNS)
            total += (piece.to(tl.float32),)
        u = total
    r = tl.rsqrt(_mean_product(u, u, d, PIECES) + eps)
    for i in tl.static_range(PIECES):
        _store_piece(normed + first * d, u[i] * r * w[i], i, d, left, d, ROWS, COLUMNS)


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
    PIECES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Grid (programs)."""
    w = _load_weight(weight, weight_stride, d, COLUMNS, PIECES)
    dweight = _zeros(ROWS, COLUMNS, PIECES)
    for tile in range(tiles):
        first = (tl.program_id(0) * tiles + tile).to(tl.int64) * ROWS
        left = count - first
        u = _load_rows(
            stream + first * aligned(stream_strides[0], ALIGN), stream_strides, left, d, ROWS, COLUMNS, PIECES, ALIGN
        )
        dy = _load_rows(
            dnormed + first * aligned(dnormed_strides[0], ALIGN), dnormed_strides, left, d, ROWS, COLUMNS, PIECES, ALIGN
        )
        if dstream is not None:
            more = _load_rows(
                dstream + first * aligned(dstream_strides[0], ALIGN),
                dstream_strides,
                left,
                d,
                ROWS,
                COLUMNS,
                PIECES,
                ALIGN,
            )
        v = ()
        for i in tl.static_range(PIECES):
            v += (dy[i] * w[i],)
        r = tl.rsqrt(_mean_product(u, u, d, PIECES) + eps)
        projection = _mean_product(u, v, d, PIECES) * r * r
        sums = ()
        for i in tl.static_range(PIECES):
            sums += (dweight[i] + dy[i] * (u[i] * r),)
            du = r * (v[i] - u[i] * projection)
            if dstream is not None:
                du += more[i]
            _store_piece(dx + first * d, du, i, d, left, d, ROWS, COLUMNS)
            if dresidual is not None:
                _store_piece(dresidual + first * d, du, i, d, left, d, ROWS, COLUMNS)
        dweight = sums
    _store_sums(partial + tl.program_id(0).to(tl.int64) * d, dweight, d, COLUMNS, PIECES)


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
    NORM_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Grid (groups * row tiles), group fastest."""
    d: tl.constexpr = GROUPS * width
    first = (tl.program_id(0) // GROUPS).to(tl.int64) * ROWS
    column = (tl.program_id(0) % GROUPS).to(tl.int64) * width
    left = count - first
    x += first * aligned(x_strides[0], ALIGN) + column * x_strides[1]
    z += first * aligned(z_strides[0], ALIGN) + column * z_strides[1]
    u = _load_rows(x, x_strides, left, width, ROWS, COLUMNS, PIECES, ALIGN)
    gate = _load_rows(z, z_strides, left, width, ROWS, COLUMNS, PIECES, ALIGN)
    w = _load_weight(weight + column * weight_stride, weight_stride, width, COLUMNS, PIECES)
    if not NORM_FIRST:
        products = ()
        for i in tl.static_range(PIECES):
            products += (u[i] * silu(gate[i]),)
        u = products
    r = tl.rsqrt(_mean_product(u, u, width, PIECES) + eps)
    for i in tl.static_range(PIECES):
        result = u[i] * r * w[i]
        if NORM_FIRST:
            result *= silu(gate[i])
        _store_piece(y + first * d + column, result, i, d, left, width, ROWS, COLUMNS)


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
    NORM_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Grid (groups * programs per group), group fastest."""
    d: tl.constexpr = GROUPS * width
    share = tl.program_id(0) // GROUPS
    column = (tl.program_id(0) % GROUPS).to(tl.int64) * width
    x += column * x_strides[1]
    z += column * z_strides[1]
    dy += column * dy_strides[1]
    w = _load_weight(weight + column * weight_stride, weight_stride, width, COLUMNS, PIECES)
    dweight = _zeros(ROWS, COLUMNS, PIECES)
    for tile in range(tiles):
        first = (share * tiles + tile).to(tl.int64) * ROWS
        left = count - first
        x_here = x + first * aligned(x_strides[0], ALIGN)
        z_here = z + first * aligned(z_strides[0], ALIGN)
        dy_here = dy + first * aligned(dy_strides[0], ALIGN)
        x_rows = _load_rows(x_here, x_strides, left, width, ROWS, COLUMNS, PIECES, ALIGN)
        z_rows = _load_rows(z_here, z_strides, left, width, ROWS, COLUMNS, PIECES, ALIGN)
        dy_rows = _load_rows(dy_here, dy_strides, left, width, ROWS, COLUMNS, PIECES, ALIGN)
        u = ()
        through = ()  # dy G
        v = ()
        for i in tl.static_range(PIECES):
            gate = silu(z_rows[i])
            through += (dy_rows[i] * gate if NORM_FIRST else dy_rows[i],)
            u += (x_rows[i] if NORM_FIRST else x_rows[i] * gate,)
            v += (through[i] * w[i],)
        r = tl.rsqrt(_mean_product(u, u, width, PIECES) + eps)
        projection = _mean_product(u, v, width, PIECES) * r * r
        sums = ()
        for i in tl.static_range(PIECES):
            s = sigmoid(z_rows[i])
            slope = s * (1.0 + z_rows[i] * (1.0 - s))
            normalised = u[i] * r
            sums += (dweight[i] + through[i] * normalised,)
            du = r * (v[i] - u[i] * projection)
            if NORM_FIRST:
                dz_piece = dy_rows[i] * w[i] * normalised * slope
            else:
                dz_piece = du * x_rows[i] * slope
                du *= z_rows[i] * s
            _store_piece(dx + first * d + column, du, i, d, left, width, ROWS, COLUMNS)
            _store_piece(dz + first * d + column, dz_piece, i, d, left, width, ROWS, COLUMNS)
        dweight = sums
    _store_sums(partial + share.to(tl.int64) * d + column, dweight, width, COLUMNS, PIECES)
