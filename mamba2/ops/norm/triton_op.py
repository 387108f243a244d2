"""The Triton backend of both norms: allocation, launches, and registration with torch.library.

Forward one launch, backward two: the gradients, and the sum over programs of the weight's. Leading dimensions are
flattened, which copies only where they cannot be viewed as one; rows of a slice of a wider tensor can.
"""

import torch
import triton

from mamba2.ops.device import multiprocessors
from mamba2.ops.gradient import register_gradient
from mamba2.ops.norm.triton_kernels import (
    _add_backward_kernel,
    _add_forward_kernel,
    _gated_backward_kernel,
    _gated_forward_kernel,
)
from mamba2.ops.triton_launch import alignment, require_kernel_tensors
from mamba2.ops.triton_reduce import sum_rows


def add_rms_norm_triton(
    x: torch.Tensor,  # (..., d)
    residual: torch.Tensor | None,  # (..., d)
    weight: torch.Tensor,  # (d,)
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mamba2.ops.add_rms_norm`."""
    require_kernel_tensors(x=x, residual=residual, weight=weight)
    normed, stream = _add_forward_op(x, residual, weight, eps, dtype)
    return normed, x if residual is None else stream


@torch.library.custom_op("mamba2::add_rms_norm_forward", mutates_args=())
def _add_forward_op(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised sum and the sum; the latter is empty without a residual, when it would be a copy of x."""
    outputs = normed, stream = _add_forward_outputs(x, residual, dtype)
    rows, more = _rows(x), None if residual is None else _rows(residual)
    count, d = rows.shape
    launch = _launch(d, FORWARD_ELEMENTS)
    if count:
        with torch.cuda.device_of(x):
            _add_forward_kernel[(triton.cdiv(count, launch["ROWS"]),)](
                rows,
                more,
                weight,
                normed,
                stream,
                rows.stride(),
                _strides(more),
                weight.stride(0),
                count,
                eps,
                d=d,
                ALIGN=alignment(rows, more),
                **launch,
            )
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
    launch = _launch(d, BACKWARD_ELEMENTS)
    tiles, programs = _share(count, launch["ROWS"], 1, u.device)
    partial = u.new_empty(programs, d, dtype=torch.float32)
    with torch.cuda.device_of(u):
        if count:
            _add_backward_kernel[(programs,)](
                dy,
                more,
                u,
                weight,
                dx,
                None if dtype == stream.dtype else dresidual,
                partial,
                dy.stride(),
                _strides(more),
                u.stride(),
                weight.stride(0),
                count,
                eps,
                tiles,
                d=d,
                ALIGN=alignment(dy, more, u),
                **launch,
            )
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
        dstream = None  # of an empty tensor
    if dnormed is None:
        return None if dstream is None else dstream.to(ctx.x_dtype), dstream, None, None, None
    dx, dresidual, dweight = _add_backward_op(dnormed, dstream, stream, weight, ctx.eps, ctx.x_dtype)
    if not ctx.has_residual:
        dresidual = None
    elif ctx.x_dtype == stream.dtype:
        dresidual = dx
    return dx, dresidual, dweight, None, None


register_gradient(_add_forward_op, _add_backward, _add_setup_context)


def gated_rms_norm_triton(
    x: torch.Tensor,  # (..., d)
    z: torch.Tensor,  # (..., d)
    weight: torch.Tensor,  # (d,)
    eps: float,
    ngroups: int,
    norm_before_gate: bool,
) -> torch.Tensor:
    """See `mamba2.ops.gated_rms_norm`."""
    require_kernel_tensors(x=x, z=z, weight=weight)
    return _gated_forward_op(x, z, weight, eps, ngroups, norm_before_gate)


@torch.library.custom_op("mamba2::gated_rms_norm_forward", mutates_args=())
def _gated_forward_op(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, ngroups: int, norm_before_gate: bool
) -> torch.Tensor:
    y = x.new_empty(x.shape)
    rows, gate = _rows(x), _rows(z)
    count, d = rows.shape
    launch = _launch(d // ngroups, FORWARD_ELEMENTS)
    if count:
        with torch.cuda.device_of(x):
            _gated_forward_kernel[(ngroups * triton.cdiv(count, launch["ROWS"]),)](
                rows,
                gate,
                weight,
                y,
                rows.stride(),
                gate.stride(),
                weight.stride(0),
                count,
                eps,
                width=d // ngroups,
                GROUPS=ngroups,
                NORM_FIRST=norm_before_gate,
                ALIGN=alignment(rows, gate),
                **launch,
            )
    return y


@_gated_forward_op.register_fake
def _(x, z, weight, eps, ngroups, norm_before_gate):
    return x.new_empty(x.shape)


@torch.library.custom_op("mamba2::gated_rms_norm_backward", mutates_args=())
def _gated_backward_op(
    dy: torch.Tensor,
    x: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    ngroups: int,
    norm_before_gate: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, z and weight."""
    outputs = dx, dz, dweight = _gated_backward_outputs(x, z, weight)
    gradient, rows, gate = _rows(dy), _rows(x), _rows(z)
    count, d = rows.shape
    launch = _launch(d // ngroups, BACKWARD_ELEMENTS)
    tiles, programs = _share(count, launch["ROWS"], ngroups, x.device)
    partial = x.new_empty(programs, d, dtype=torch.float32)
    with torch.cuda.device_of(x):
        if count:
            _gated_backward_kernel[(ngroups * programs,)](
                gradient,
                rows,
                gate,
                weight,
                dx,
                dz,
                partial,
                gradient.stride(),
                rows.stride(),
                gate.stride(),
                weight.stride(0),
                count,
                eps,
                tiles,
                width=d // ngroups,
                GROUPS=ngroups,
                NORM_FIRST=norm_before_gate,
                ALIGN=alignment(gradient, rows, gate),
                **launch,
            )
        sum_rows(partial, dweight)
    return outputs


@_gated_backward_op.register_fake
def _(dy, x, z, weight, eps, ngroups, norm_before_gate):
    return _gated_backward_outputs(x, z, weight)


def _gated_backward_outputs(*inputs):
    return tuple(t.new_empty(t.shape) for t in inputs)


def _gated_setup_context(ctx, inputs, output):
    x, z, weight, *ctx.options = inputs
    ctx.save_for_backward(x, z, weight)


def _gated_backward(ctx, dy):
    return *_gated_backward_op(dy, *ctx.saved_tensors, *ctx.options), None, None, None


register_gradient(_gated_forward_op, _gated_backward, _gated_setup_context)


# Elements of a tile, at most, held by four warps; a wider row has more warps. The backward holds twice the tensors.
FORWARD_ELEMENTS = 2048
BACKWARD_ELEMENTS = 1024


def _launch(width: int, elements: int) -> dict:
    """Rows, columns and pieces of a tile, and warps.

    A row up to `elements` wide is one piece, and a tile several rows. A wider one is cut into the fewest pieces that
    pad it by less than a quarter: 2560 into 3 of 1024, 5120 into 3 of 2048.
    """
    columns, pieces = triton.next_power_of_2(width), 1
    while columns > 1024 and columns * pieces * 4 > width * 5:
        columns //= 2
        pieces = triton.cdiv(width, columns)
    return {
        "ROWS": max(1, elements // columns),
        "COLUMNS": columns,
        "PIECES": pieces,
        "num_warps": min(16, max(4, triton.next_power_of_2(4 * columns * pieces // elements))),
    }


def _share(count: int, rows: int, groups: int, device: torch.device) -> tuple[int, int]:
    """Row tiles per program and programs per group: together four programs for each multiprocessor, if there are
    rows for as many, so that partial sums stay few."""
    tiles = triton.cdiv(count, rows)
    per_program = max(1, triton.cdiv(tiles * groups, 4 * multiprocessors(device)))
    return per_program, triton.cdiv(tiles, per_program)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _strides(rows: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if rows is None else rows.stride()
