"""Root-mean-square norms (Zhang & Sennrich 2019, arXiv:1910.07467): of the residual stream, and gated inside the mixer.

A row is one token's channels, or one group of them; w is its width. With r = 1 / sqrt(mean(u²) + eps):

    add_rms_norm      u = residual + x         y = weight u r
    gated_rms_norm    u = x silu(z)            y = weight u r        per group; the gate before the norm

and backward, with v = weight dy:

    du = r v - u r³ mean(v u)        dweight = Σ_rows dy u r
    add      dx = dresidual = du + dstream
    gated    dx = du silu(z),  dz = du x silu'(z)

The kernels (the plain torch forms: `norm_torch.py`) have a grid of (groups * row tiles). A program holds ROWS whole
rows of one group in registers, as a tuple of PIECES pieces of COLUMNS columns, so that a row of 5120 is not padded to
8192; the groups of a token are neighbours in the grid. In the backward it processes several such tiles, so that few
rows of partial sums of dweight are left for `sum_rows`, and recomputes r from the row, which it needs anyway. Only the
inputs are kept for the backward; of add_rms_norm the sum in place of x and residual, which is stored anyway.

Bytes per token, 16-bit activations, float32 stream: add 12 d forward, 16 d backward; gated 6 d forward, 10 d backward.
"""

from typing import Any, NamedTuple

import torch

from mamba2.ops.backend import choose_backend
from mamba2.ops.gradient import empty_gradients, register_gradient, unwatched
from mamba2.ops.kernel import (
    aligned,
    alignment,
    constant,
    multiprocessors,
    require_kernel_tensors,
    sigmoid,
    silu,
    strided,
    sum_rows,
)
from mamba2.ops.language import tl, triton
from mamba2.ops.norm_torch import (
    add_rms_norm_blocked,
    add_rms_norm_reference,
    gated_rms_norm_blocked,
    gated_rms_norm_reference,
)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a block's output to the residual stream and normalise the sum, in float32.

    Arguments:
        x: (..., d) output of the block before, or the embeddings; any float dtype.
        residual: (..., d) the stream so far, whose dtype the sum keeps, or None at the start: the stream is then x.
        weight: (d,).
        eps: added to the mean square.
        dtype: of the normalised result; x's if None.

    Returns (normalised (..., d) in `dtype`, residual + x (..., d) in the stream's dtype).
    Raises ValueError naming the argument whose shape does not fit, or dtype where the backend is Triton.
    """
    if tuple(weight.shape) != x.shape[-1:]:
        raise ValueError(f"weight must have shape ({x.shape[-1]},), not {tuple(weight.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {tuple(x.shape)}, not {tuple(residual.shape)}")
    implementation = ADD_IMPLEMENTATIONS[choose_backend(x, tuple(ADD_IMPLEMENTATIONS))]
    return implementation(x, residual, weight, eps, x.dtype if dtype is None else dtype)


def gated_rms_norm(
    x: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    ngroups: int = 1,
) -> torch.Tensor:
    """Gate by silu(z) and normalise each of `ngroups` equal slices of the channels by itself, in float32.

    Arguments:
        x, z: (..., d), any float dtype.
        weight: (d,).
        eps: added to the mean square.
        ngroups: slices of d / ngroups channels, each with its own mean square.

    Returns (..., d) in x's dtype. The meaning is that of mamba-ssm's `RMSNormGated` with group_size = d / ngroups.
    Raises ValueError naming the argument whose shape does not fit, ngroups, or dtype where the backend is Triton.
    """
    d = x.shape[-1]
    if z.shape != x.shape:
        raise ValueError(f"z must have the shape of x, {tuple(x.shape)}, not {tuple(z.shape)}")
    if tuple(weight.shape) != (d,):
        raise ValueError(f"weight must have shape ({d},), not {tuple(weight.shape)}")
    if ngroups < 1 or d % ngroups != 0:
        raise ValueError(f"ngroups must divide the {d} channels, not {ngroups}")
    implementation = GATED_IMPLEMENTATIONS[choose_backend(x, tuple(GATED_IMPLEMENTATIONS))]
    return implementation(x, z, weight, eps, ngroups)


class Tiling(NamedTuple):
    """Compile-time parameters of a kernel; every field is a `tl.constexpr`."""

    width: Any  # of a group
    GROUPS: Any
    ROWS: Any
    COLUMNS: Any
    PIECES: Any
    ALIGN: Any  # divides the strides of rows


@triton.jit
def _mask(i: tl.constexpr, left, Z):
    """Mask of piece i: rows among the `left` remaining ones, columns among the row's `width`."""
    return (tl.arange(0, Z.ROWS)[:, None] < left) & ((tl.arange(0, Z.COLUMNS) + i * Z.COLUMNS)[None, :] < Z.width)


@triton.jit
def _load_rows(v, first, column, left, Z):
    """Pieces (ROWS, COLUMNS) of the rows from `first` and `column` on, float32, zero outside."""
    stride = aligned(v.strides[0], Z.ALIGN)
    here = v.pointer + first * stride + column * v.strides[1]
    rows = tl.arange(0, Z.ROWS).to(tl.int64) * stride
    result = ()
    for i in tl.static_range(Z.PIECES):
        columns = (tl.arange(0, Z.COLUMNS) + i * Z.COLUMNS).to(tl.int64) * v.strides[1]
        result += (tl.load(here + rows[:, None] + columns[None, :], mask=_mask(i, left, Z), other=0.0).to(tl.float32),)
    return result


@triton.jit
def _store_piece(pointer, value, i: tl.constexpr, first, column, left, Z):
    """Store piece i of the rows from `first` and `column` on; rows are contiguous."""
    stride: tl.constexpr = Z.GROUPS * Z.width
    offsets = tl.arange(0, Z.ROWS)[:, None] * stride + (tl.arange(0, Z.COLUMNS) + i * Z.COLUMNS)[None, :]
    here = pointer + first * stride + column
    tl.store(here + offsets, value.to(pointer.dtype.element_ty), mask=_mask(i, left, Z))


@triton.jit
def _load_weight(weight, column, Z):
    result = ()
    for i in tl.static_range(Z.PIECES):
        columns = tl.arange(0, Z.COLUMNS) + i * Z.COLUMNS
        pointers = weight.pointer + column * weight.strides[0] + columns.to(tl.int64) * weight.strides[0]
        result += (tl.load(pointers, mask=columns < Z.width, other=0.0).to(tl.float32)[None, :],)
    return result


@triton.jit
def _zeros(Z):
    result = ()
    for _ in tl.static_range(Z.PIECES):
        result += (tl.zeros((Z.ROWS, Z.COLUMNS), dtype=tl.float32),)
    return result


@triton.jit
def _mean_product(a, b, Z):
    """Mean of a b over each row, (ROWS, 1)."""
    total = a[0] * b[0]
    for i in tl.static_range(1, Z.PIECES):
        total += a[i] * b[i]
    return tl.sum(total, axis=1)[:, None] * (1.0 / Z.width)


@triton.jit
def _store_sums(partial, share, column, dweight, Z):
    """Write the program's share of dweight to its row of `partial` (shares, d)."""
    here = partial + share.to(tl.int64) * (Z.GROUPS * Z.width) + column
    for i in tl.static_range(Z.PIECES):
        columns = tl.arange(0, Z.COLUMNS) + i * Z.COLUMNS
        tl.store(here + columns, tl.sum(dweight[i], axis=0), mask=columns < Z.width)


@triton.jit
def _add_forward_kernel(
    x,  # (rows, d)
    residual,  # (rows, d) or None
    weight,  # (d)
    normed,  # out: (rows, d), contiguous
    stream,  # out: (rows, d), contiguous; unused without a residual, when the stream is x
    count,
    eps,
    Z,
):
    """Grid (row tiles)."""
    first = tl.program_id(0).to(tl.int64) * Z.ROWS
    left = count - first
    u = _load_rows(x, first, 0, left, Z)
    w = _load_weight(weight, 0, Z)
    if residual is not None:
        more = _load_rows(residual, first, 0, left, Z)
        narrow = stream.dtype.element_ty
        total = ()
        for i in tl.static_range(Z.PIECES):
            # As in the reference, x and the sum are rounded to the stream's dtype before the norm.
            piece = (u[i].to(narrow).to(tl.float32) + more[i]).to(narrow)
            _store_piece(stream, piece, i, first, 0, left, Z)
            total += (piece.to(tl.float32),)
        u = total
    r = tl.rsqrt(_mean_product(u, u, Z) + eps)
    for i in tl.static_range(Z.PIECES):
        _store_piece(normed, u[i] * r * w[i], i, first, 0, left, Z)


@triton.jit
def _add_backward_kernel(
    dnormed,  # (rows, d)
    dstream,  # (rows, d) or None
    stream,  # (rows, d)
    weight,  # (d)
    dx,  # out: (rows, d), contiguous
    dresidual,  # out: (rows, d), contiguous, or None where dx serves for both
    partial,  # out: (programs, d), float32
    count,
    eps,
    tiles,  # row tiles per program
    Z,
):
    """Grid (programs)."""
    w = _load_weight(weight, 0, Z)
    dweight = _zeros(Z)
    for tile in range(tiles):
        first = (tl.program_id(0) * tiles + tile).to(tl.int64) * Z.ROWS
        left = count - first
        u = _load_rows(stream, first, 0, left, Z)
        dy = _load_rows(dnormed, first, 0, left, Z)
        if dstream is not None:
            more = _load_rows(dstream, first, 0, left, Z)
        v = ()
        for i in tl.static_range(Z.PIECES):
            v += (dy[i] * w[i],)
        r = tl.rsqrt(_mean_product(u, u, Z) + eps)
        projection = _mean_product(u, v, Z) * r * r
        sums = ()
        for i in tl.static_range(Z.PIECES):
            sums += (dweight[i] + dy[i] * (u[i] * r),)
            du = r * (v[i] - u[i] * projection)
            if dstream is not None:
                du += more[i]
            _store_piece(dx, du, i, first, 0, left, Z)
            if dresidual is not None:
                _store_piece(dresidual, du, i, first, 0, left, Z)
        dweight = sums
    _store_sums(partial, tl.program_id(0), 0, dweight, Z)


@triton.jit
def _gated_forward_kernel(
    x,  # (rows, groups * width)
    z,  # (rows, groups * width)
    weight,  # (groups * width)
    y,  # out: (rows, groups * width), contiguous
    count,
    eps,
    Z,
):
    """Grid (groups * row tiles), group fastest."""
    first = (tl.program_id(0) // Z.GROUPS).to(tl.int64) * Z.ROWS
    column = (tl.program_id(0) % Z.GROUPS).to(tl.int64) * Z.width
    left = count - first
    x_rows = _load_rows(x, first, column, left, Z)
    z_rows = _load_rows(z, first, column, left, Z)
    w = _load_weight(weight, column, Z)
    u = ()
    for i in tl.static_range(Z.PIECES):
        u += (x_rows[i] * silu(z_rows[i]),)
    r = tl.rsqrt(_mean_product(u, u, Z) + eps)
    for i in tl.static_range(Z.PIECES):
        _store_piece(y, u[i] * r * w[i], i, first, column, left, Z)


@triton.jit
def _gated_backward_kernel(
    dy,  # (rows, groups * width)
    x,  # (rows, groups * width)
    z,  # (rows, groups * width)
    weight,  # (groups * width)
    dx,  # out: (rows, groups * width), contiguous
    dz,  # out: (rows, groups * width), contiguous
    partial,  # out: (programs / groups, groups * width), float32
    count,
    eps,
    tiles,  # row tiles per program
    Z,
):
    """Grid (groups * programs per group), group fastest."""
    share = tl.program_id(0) // Z.GROUPS
    column = (tl.program_id(0) % Z.GROUPS).to(tl.int64) * Z.width
    w = _load_weight(weight, column, Z)
    dweight = _zeros(Z)
    for tile in range(tiles):
        first = (share * tiles + tile).to(tl.int64) * Z.ROWS
        left = count - first
        x_rows = _load_rows(x, first, column, left, Z)
        z_rows = _load_rows(z, first, column, left, Z)
        dy_rows = _load_rows(dy, first, column, left, Z)
        u = ()
        v = ()
        for i in tl.static_range(Z.PIECES):
            u += (x_rows[i] * silu(z_rows[i]),)
            v += (dy_rows[i] * w[i],)
        r = tl.rsqrt(_mean_product(u, u, Z) + eps)
        projection = _mean_product(u, v, Z) * r * r
        sums = ()
        for i in tl.static_range(Z.PIECES):
            s = sigmoid(z_rows[i])
            sums += (dweight[i] + dy_rows[i] * (u[i] * r),)
            du = r * (v[i] - u[i] * projection)
            _store_piece(dx, du * (z_rows[i] * s), i, first, column, left, Z)
            slope = s * (1.0 + z_rows[i] * (1.0 - s))
            _store_piece(dz, du * x_rows[i] * slope, i, first, column, left, Z)
        dweight = sums
    _store_sums(partial, share, column, dweight, Z)


def add_rms_norm_triton(
    x: torch.Tensor,  # (..., d)
    residual: torch.Tensor | None,  # (..., d)
    weight: torch.Tensor,  # (d,)
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `add_rms_norm`. Forward one launch, backward two: the gradients, and the sum over programs of the weight's.

    Leading dimensions are flattened, which copies only where they cannot be viewed as one.
    """
    require_kernel_tensors(x=x, residual=residual, weight=weight)
    normed, stream = _add_forward(x, residual, weight, eps, dtype)
    return normed, x if residual is None else stream


@torch.library.custom_op("mamba2::add_rms_norm_forward", mutates_args=())
def _add_forward_op(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised sum and the sum; the latter is empty without a residual, when it would be a copy of x."""
    outputs = normed, stream = _add_forward_outputs(x, residual, dtype)
    rows, more = _rows(x), None if residual is None else _rows(residual)
    count, d = rows.shape
    Z, warps = _launch(d, 1, FORWARD_ELEMENTS, rows, more)
    if count:
        tensors = *map(strided, (rows, more, weight)), normed, stream
        with torch.cuda.device_of(x):
            _add_forward_kernel[(triton.cdiv(count, Z.ROWS.value),)](*tensors, count, eps, Z, num_warps=warps)
    return outputs


@_add_forward_op.register_fake
def _(x, residual, weight, eps, dtype):
    return _add_forward_outputs(x, residual, dtype)


def _add_forward_outputs(x, residual, dtype):
    stream = x.new_empty(0) if residual is None else residual.new_empty(x.shape)
    return x.new_empty(x.shape, dtype=dtype), stream


@torch.library.custom_op("mamba2::add_rms_norm_backward", mutates_args=())
def _add_backward_op(
    dnormed: torch.Tensor,
    dstream: torch.Tensor | None,
    stream: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient of the sum in x's `dtype`, again in the stream's (empty where that is the same), gradient of weight."""
    outputs = dx, dresidual, dweight = _add_backward_outputs(stream, weight, dtype)
    dy, u, more = _rows(dnormed), _rows(stream), None if dstream is None else _rows(dstream)
    count, d = u.shape
    Z, warps = _launch(d, 1, BACKWARD_ELEMENTS, dy, more, u)
    tiles, programs = _share(count, Z.ROWS.value, 1, u.device)
    partial = u.new_empty(programs, d, dtype=torch.float32)
    with torch.cuda.device_of(u):
        if count:
            results = dx, None if dtype == stream.dtype else dresidual, partial
            tensors = *map(strided, (dy, more, u, weight)), *results
            _add_backward_kernel[(programs,)](*tensors, count, eps, tiles, Z, num_warps=warps)
        sum_rows(partial, dweight)
    return outputs


@_add_backward_op.register_fake
def _(dnormed, dstream, stream, weight, eps, dtype):
    return _add_backward_outputs(stream, weight, dtype)


def _add_backward_outputs(stream, weight, dtype):
    dx = stream.new_empty(stream.shape, dtype=dtype)
    dresidual = stream.new_empty(0 if dtype == stream.dtype else stream.shape)
    return dx, dresidual, weight.new_empty(weight.shape)


def _add_setup_context(ctx, inputs, output):
    x, residual, weight, ctx.eps, _dtype = inputs
    ctx.set_materialize_grads(False)
    ctx.x_dtype = x.dtype
    ctx.has_residual = residual is not None
    ctx.save_for_backward(output[1] if ctx.has_residual else x, weight)


def _add_backward(ctx, dnormed, dstream):
    stream, weight = ctx.saved_tensors
    if not ctx.has_residual:
        dstream = None  # gradient of an empty tensor
    if dnormed is None:
        return None if dstream is None else dstream.to(ctx.x_dtype), dstream, None, None, None
    dx, dresidual, dweight = _add_gradients(dnormed, dstream, stream, weight, ctx.eps, ctx.x_dtype)
    if not ctx.has_residual:
        dresidual = None
    elif ctx.x_dtype == stream.dtype:
        dresidual = dx
    return dx, dresidual, dweight, None, None


_add_forward = register_gradient(_add_forward_op, _add_backward, _add_setup_context)
_add_gradients = unwatched(_add_backward_op)


def gated_rms_norm_triton(
    x: torch.Tensor,  # (..., d)
    z: torch.Tensor,  # (..., d)
    weight: torch.Tensor,  # (d,)
    eps: float,
    ngroups: int,
) -> torch.Tensor:
    """See `gated_rms_norm`."""
    require_kernel_tensors(x=x, z=z, weight=weight)
    return _gated_forward(x, z, weight, eps, ngroups)


@torch.library.custom_op("mamba2::gated_rms_norm_forward", mutates_args=())
def _gated_forward_op(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, ngroups: int) -> torch.Tensor:
    y = x.new_empty(x.shape)
    rows, gate = _rows(x), _rows(z)
    count, d = rows.shape
    Z, warps = _launch(d // ngroups, ngroups, FORWARD_ELEMENTS, rows, gate)
    if count:
        grid = (ngroups * triton.cdiv(count, Z.ROWS.value),)
        with torch.cuda.device_of(x):
            _gated_forward_kernel[grid](*map(strided, (rows, gate, weight)), y, count, eps, Z, num_warps=warps)
    return y


@_gated_forward_op.register_fake
def _(x, z, weight, eps, ngroups):
    return x.new_empty(x.shape)


@torch.library.custom_op("mamba2::gated_rms_norm_backward", mutates_args=())
def _gated_backward_op(
    dy: torch.Tensor, x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, ngroups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, z and weight."""
    outputs = dx, dz, dweight = empty_gradients(x, z, weight)
    gradient, rows, gate = _rows(dy), _rows(x), _rows(z)
    count, d = rows.shape
    Z, warps = _launch(d // ngroups, ngroups, BACKWARD_ELEMENTS, gradient, rows, gate)
    tiles, programs = _share(count, Z.ROWS.value, ngroups, x.device)
    partial = x.new_empty(programs, d, dtype=torch.float32)
    with torch.cuda.device_of(x):
        if count:
            tensors = *map(strided, (gradient, rows, gate, weight)), dx, dz, partial
            _gated_backward_kernel[(ngroups * programs,)](*tensors, count, eps, tiles, Z, num_warps=warps)
        sum_rows(partial, dweight)
    return outputs


@_gated_backward_op.register_fake
def _(dy, x, z, weight, eps, ngroups):
    return empty_gradients(x, z, weight)


def _gated_setup_context(ctx, inputs, output):
    x, z, weight, *ctx.options = inputs
    ctx.save_for_backward(x, z, weight)


def _gated_backward(ctx, dy):
    return *_gated_gradients(dy, *ctx.saved_tensors, *ctx.options), None, None


_gated_forward = register_gradient(_gated_forward_op, _gated_backward, _gated_setup_context)
_gated_gradients = unwatched(_gated_backward_op)


# Elements of a tile, at most, held by four warps; a wider row has more warps. The backward holds twice the tensors.
FORWARD_ELEMENTS = 2048
BACKWARD_ELEMENTS = 1024


def _launch(width: int, groups: int, elements: int, *tensors: torch.Tensor | None) -> tuple[Tiling, int]:
    """The tile for rows of `tensors`, and its warps.

    A row up to `elements` wide is one piece, and a tile several rows. A wider one is cut into the fewest pieces that
    pad it by less than a quarter: 2560 into 3 of 1024, 5120 into 3 of 2048.
    """
    columns, pieces = triton.next_power_of_2(width), 1
    while columns > 1024 and columns * pieces * 4 > width * 5:
        columns //= 2
        pieces = triton.cdiv(width, columns)
    numbers = width, groups, max(1, elements // columns), columns, pieces, alignment(*tensors)
    warps = min(16, max(4, triton.next_power_of_2(4 * columns * pieces // elements)))
    return Tiling(*map(constant, numbers)), warps


def _share(count: int, rows: int, groups: int, device: torch.device) -> tuple[int, int]:
    """Row tiles per program and programs per group: together four programs for each multiprocessor, if there are
    rows for as many, so that partial sums stay few."""
    tiles = triton.cdiv(count, rows)
    per_program = max(1, triton.cdiv(tiles * groups, 4 * multiprocessors(device)))
    return per_program, triton.cdiv(tiles, per_program)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


ADD_IMPLEMENTATIONS = {
    "reference": add_rms_norm_reference,
    "torch": add_rms_norm_blocked,
    "triton": add_rms_norm_triton,
}
GATED_IMPLEMENTATIONS = {
    "reference": gated_rms_norm_reference,
    "torch": gated_rms_norm_blocked,
    "triton": gated_rms_norm_triton,
}
