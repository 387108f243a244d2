"""Shared by kernels and launchers: the device, tensors with strides, elementwise functions, sums over programs.

The interpreter, which has no device, uses the launches of an H100. Exponentials are base 2.

Gradients of parameters are summed over programs in a fixed order, so that they are reproducible:

    first_j = Σ_r partial_{r,j}  for j < split        second_{j - split} = Σ_r partial_{r,j}  for j >= split
    third_j = Σ_r other_{r,j}

Grid of `_sum_rows_kernel`: (columns / COLUMNS, then those of `other`). A program owns COLUMNS columns and walks all
rows. Reads each workspace once, 4 bytes per element, and writes each sum once, in the parameter's dtype.
"""

import functools
import math
from typing import Any, NamedTuple

import torch

from mamba2.ops.backend import TRITON_DTYPES
from mamba2.ops.language import tl, triton


@functools.cache
def target_of(device: torch.device) -> str:
    """The device's name in the launch tables: sm_90, gfx942, …"""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The device's multiprocessors: at least so many programs run at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def require_kernel_tensors(**named: torch.Tensor | None) -> None:
    """Raise ValueError naming the first tensor of a dtype that no kernel takes or on another device than the first."""
    first, reference = next(iter(named.items()))
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.dtype not in TRITON_DTYPES:
            raise ValueError(f"the Triton backend takes {name} in float32, bfloat16 or float16, not {tensor.dtype}")
        if tensor.device != reference.device:
            raise ValueError(
                f"{name} is on {tensor.device} and {first} on {reference.device}; all must be on one device"
            )


def alignment(*tensors: torch.Tensor | None) -> int:
    """Greatest common divisor, in elements, of 8 and every stride of the tensors but the last.

    Triton knows a stride as aligned only if 16 divides it. The rows of a slice of in_proj's output often start at
    multiples of 8 elements and no more, and without this number each thread would load them one by one.
    """
    strides = [stride for t in tensors if t is not None for stride in t.stride()[:-1]]
    return math.gcd(8, *strides)


class Strided(NamedTuple):
    """A tensor as a kernel argument, with strides known at run time."""

    pointer: Any
    strides: tuple[int, ...]


def strided(tensor: torch.Tensor | None) -> Strided | None:
    return None if tensor is None else Strided(tensor, tensor.stride())


@functools.lru_cache(maxsize=None, typed=True)
def constant(value: Any) -> tl.constexpr:
    """One object per value: Triton looks up compiled kernels by their constants, and is slow to compare two objects."""
    return tl.constexpr(value)


LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp2(-z * LOG2E))


@triton.jit
def silu(z):
    return z / (1.0 + tl.exp2(-z * LOG2E))


@triton.jit
def silu_slope(z):
    """Derivative of silu."""
    s = sigmoid(z)
    return s * (1.0 + z * (1.0 - s))


@triton.jit
def softplus(raw):
    """log(1 + exp(raw)) to within float32's rounding.

    Near raw = -7, where steps of 1e-3 come from, 1 + exp(raw) has lost half of exp(raw)'s digits. Up to exp(raw) =
    1/4 the series 2 atanh(s), s = e / (2 + e), is used: its first omitted term is below 1e-9 of the result.
    """
    e = tl.exp2(tl.minimum(raw, 20.0) * LOG2E)
    s = e / (2.0 + e)
    s2 = s * s
    series = 2.0 * s * (1.0 + s2 * (1.0 / 3.0 + s2 * (1.0 / 5.0 + s2 * (1.0 / 7.0 + s2 * (1.0 / 9.0)))))
    direct = tl.log(1.0 + e)
    return tl.where(raw > 20.0, raw, tl.where(e < 0.25, series, direct))


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """The same stride, in a form that tells the compiler that ALIGN divides it (see `alignment`)."""
    return stride // ALIGN * ALIGN


# 8 float32 are one sector of 32 bytes: the narrowest column block that wastes no traffic gives the most programs.
ROWS, COLUMNS = 128, 8


@triton.jit
def _sum_rows_kernel(
    partial,  # (rows, columns), float32, contiguous
    first,  # out: (split)
    second,  # out: (columns - split) or None
    other,  # (other_rows, other_columns), float32, contiguous, or None
    third,  # out: (other_columns) or None
    rows,
    split,
    columns,
    other_rows,
    other_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles = tl.cdiv(columns, COLUMNS)
    if tile < tiles:
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        result = _sum(partial, column, rows, columns, ROWS)
        tl.store(first + column, result.to(first.dtype.element_ty), mask=column < split)
        if second is not None:
            beyond = (column >= split) & (column < columns)
            tl.store(second + (column - split), result.to(second.dtype.element_ty), mask=beyond)
    elif third is not None:
        column = (tile - tiles) * COLUMNS + tl.arange(0, COLUMNS)
        result = _sum(other, column, other_rows, other_columns, ROWS)
        tl.store(third + column, result.to(third.dtype.element_ty), mask=column < other_columns)


@triton.jit
def _sum(partial, column, rows, columns, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, column.shape[0]), dtype=tl.float32)
    for start in range(0, rows, ROWS):
        mask = (row[:, None] < rows - start) & (column[None, :] < columns)
        offsets = (start + row).to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(partial + offsets, mask=mask, other=0.0)
    return tl.sum(total, axis=0)


def sum_rows(
    partial: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor | None = None,
    other: torch.Tensor | None = None,
    third: torch.Tensor | None = None,
) -> None:
    """In one launch, sum the rows of `partial` into `first` and then `second`, and those of `other` into `third`.

    All are contiguous, the workspaces (rows, columns) in float32. Columns of `partial` past `first` are dropped where
    there is no `second`.
    """
    rows, columns = partial.shape
    tile_rows = min(ROWS, 1 << (rows - 1).bit_length())
    tile_columns = COLUMNS * ROWS // tile_rows
    other_rows, other_columns = (0, 0) if other is None else other.shape
    grid = (-(-columns // tile_columns) - (-other_columns // tile_columns),)
    _sum_rows_kernel[grid](
        partial,
        first,
        second,
        other,
        third,
        rows,
        first.numel(),
        columns,
        other_rows,
        other_columns,
        ROWS=tile_rows,
        COLUMNS=tile_columns,
        num_warps=4,
    )
