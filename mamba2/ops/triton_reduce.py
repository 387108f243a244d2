"""Gradients of parameters, summed over the programs that saw different tokens: in a fixed order, so repeatable.

    first_j = Σ_r partial_{r,j}  for j < split        second_{j - split} = Σ_r partial_{r,j}  for j >= split

Grid (columns / COLUMNS). A program owns COLUMNS columns and walks all rows. Reads the workspace once, 4 bytes per
element, and writes each sum once, in the parameter's dtype.
"""

import torch
import triton
import triton.language as tl

# 8 float32 are one sector of 32 bytes: the narrowest column block that wastes no traffic gives the most programs.
COLUMNS = 8
ROWS = 128


@triton.jit
def _sum_rows_kernel(
    partial,  # (rows, columns), float32, contiguous
    first,  # out: (split)
    second,  # out: (columns - split) or None
    rows,
    split,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, rows, ROWS):
        mask = (row[:, None] < rows - start) & (column[None, :] < columns)
        offsets = (start + row).to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(partial + offsets, mask=mask, other=0.0)
    result = tl.sum(total, axis=0)
    tl.store(first + column, result.to(first.dtype.element_ty), mask=column < split)
    if second is not None:
        beyond = (column >= split) & (column < columns)
        tl.store(second + (column - split), result.to(second.dtype.element_ty), mask=beyond)


def sum_rows(partial: torch.Tensor, first: torch.Tensor, second: torch.Tensor | None = None) -> None:
    """Sum the rows of `partial` (rows, columns), float32, into `first` and then `second`, both contiguous."""
    rows, columns = partial.shape
    grid = (triton.cdiv(columns, COLUMNS),)
    _sum_rows_kernel[grid](
        partial, first, second, rows, first.numel(), columns, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4
    )
