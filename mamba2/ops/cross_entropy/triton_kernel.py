"""Softmax, loss and gradient of a chunk of logits, in place.

    lse = log Σ_v exp(logits_v)          loss = lse - logits_target + z lse²
    logits_v <- softmax_v (1 + 2 z lse) - [v = target]            all 0 where the target is ignored

Grid (rows). A program owns one row and goes over it twice: once for its maximum and its sum, kept per lane of 8
logits so that nothing crosses lanes inside the loop and each logit costs little more than one exponential; once to
overwrite it with its gradient. The second reading comes from L2: the rows at work are a few tens of megabytes.

Bytes per token, 16-bit logits: read 2 v, written 2 v, and 12 for target and loss.
"""

import triton
import triton.language as tl

from mamba2.ops.triton_math import LOG2E, aligned

LANE = tl.constexpr(8)


@triton.jit
def _load_logits(pointer, columns, start, v: tl.constexpr, end: tl.constexpr):
    """Logits from `start` on, float32; -inf past the vocabulary."""
    x = tl.load(pointer + start + columns, mask=columns < end - start, other=float("-inf")).to(tl.float32)
    if end != v:
        x = tl.where(columns < v - start, x, float("-inf"))
    return x


@triton.jit
def _softmax_kernel(
    logits,  # (rows, v); overwritten with the gradient if GRADIENT
    targets,  # (rows)
    losses,  # out: (rows), float32
    row_stride,
    ignore_index,
    z_loss,
    v: tl.constexpr,
    BLOCK: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Grid (rows). A target outside the vocabulary makes the loss and the gradient of its row NaN."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * aligned(row_stride, ALIGN)
    # Where rows are as aligned as lanes, the last lane is read and written whole, past v but inside its row.
    end: tl.constexpr = (v + ALIGN - 1) // ALIGN * ALIGN
    columns = tl.arange(0, BLOCK // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]

    # Not -inf, whose difference from itself is NaN, in lanes that lie past the end.
    highest = tl.full((BLOCK // LANE,), -1.0e38, dtype=tl.float32)
    total = tl.zeros((BLOCK // LANE,), dtype=tl.float32)
    for start in range(0, v, BLOCK):
        x = _load_logits(logits, columns, start, v, end)
        higher = tl.maximum(highest, tl.max(x, axis=1))
        terms = tl.exp2((x - higher[:, None]) * LOG2E)
        total = total * tl.exp2((highest - higher) * LOG2E) + tl.sum(terms, axis=1)
        highest = higher
    top = tl.max(highest, axis=0)
    lse = top + tl.log(tl.sum(total * tl.exp2((highest - top) * LOG2E), axis=0))

    target = tl.load(targets + row)
    kept = target != ignore_index
    outside = (target < 0) | (target >= v)
    at_target = tl.load(logits + target, mask=kept & (not outside), other=float("nan")).to(tl.float32)
    loss = lse - at_target + z_loss * lse * lse
    tl.store(losses + row, tl.where(kept, loss, 0.0))

    if GRADIENT:
        # Every thread has read logits[target] before one of them overwrites it.
        tl.debug_barrier()
        factor = tl.where(outside, float("nan"), 1.0 + 2.0 * z_loss * lse)
        for start in range(0, v, BLOCK):
            x = _load_logits(logits, columns, start, v, end)
            gradient = tl.exp2((x - lse) * LOG2E) * factor
            gradient = tl.where(start + columns == target, gradient - 1.0, gradient)
            gradient = tl.where(kept, gradient, 0.0)
            tl.store(logits + start + columns, gradient.to(logits.dtype.element_ty), mask=columns < end - start)
