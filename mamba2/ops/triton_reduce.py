"""Gradients of parameters, summed over the programs that saw different tokens: in a fixed order, so repeatable.

    first_j = Σ_r partial_{r,j}  for j < split        second_{j - split} = Σ_r partial_{r,j}  for j >= split
    third_j = Σ_r other_{r,j}

Grid (columns / COLUMNS, then those of `other`). A program owns COLUMNS columns and walks all rows. Reads each workspace
once, 4 bytes per element, and writes each sum once, in the parameter's dtype.
"""

import torch
import triton
import triton.language as tl

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
