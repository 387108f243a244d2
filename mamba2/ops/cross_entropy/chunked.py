"""Cross-entropy of a linear layer by chunks of tokens; the gradients are computed while the logits are there.

The products are torch's. What lies between them, from logits to their gradient, is `torch_softmax` here or the Triton
kernel of `triton_softmax.py`.
"""

from collections.abc import Callable

import torch

from mamba2.ops.device import block_elements
from mamba2.ops.fusion import fusable, is_fused

# Logits of one chunk, in float32. Not smaller, because every chunk also reads and writes the whole gradient of the
# weight: with this size, at a vocabulary of 50 280 in 16 bits, half of what the products and the softmax move.
CHUNK_BYTES = 128 * 2**20

# On a processor, in the logits' own dtype: its memory is slower to obtain than to read.
CPU_CHUNK_BYTES = 50 * 2**20

# (logits (t, v), targets (t,), ignore_index, z_loss, whether the gradient is wanted) -> losses (t,), at least float32,
# and the gradient of their sum in the logits, in the logits' dtype, or None. May overwrite the logits.
Softmax = Callable[[torch.Tensor, torch.Tensor, int, float, bool], tuple[torch.Tensor, torch.Tensor | None]]


def torch_softmax(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, z_loss: float, want_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    tokens, vocab = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    kept = targets != ignore_index
    safe = torch.where(kept, targets, 0)[:, None]  # (t, 1)
    lse = torch.empty(tokens, 1, dtype=wide, device=logits.device)
    narrow_picked = torch.empty(tokens, 1, dtype=logits.dtype, device=logits.device)
    # A few rows at a time, whose wide copy stays in cache for all that is done to it; fused, there is no such copy.
    rows = tokens if is_fused() else max(1, block_elements(logits.device) // vocab)
    for start in range(0, tokens, rows):
        part = slice(start, start + rows)
        torch.gather(logits[part], 1, safe[part], out=narrow_picked[part])
        lse[part] = _softmax_rows(logits[part], kept[part, None], z_loss, want_gradient)
    picked = narrow_picked.to(wide)
    if want_gradient:
        # Where the softmax is near 1 its difference from 1 is not to be rounded before.
        target = torch.exp(picked - lse) * (1.0 + 2.0 * z_loss * lse) - 1.0
        logits[torch.arange(tokens, device=logits.device), safe[:, 0]] = (target[:, 0] * kept).to(logits.dtype)
    losses = torch.where(kept, (lse - picked)[:, 0] + z_loss * lse[:, 0].square(), 0.0)
    return losses, logits if want_gradient else None


@fusable
def _softmax_rows(logits: torch.Tensor, kept: torch.Tensor, z_loss: float, want_gradient: bool) -> torch.Tensor:
    """log Σ exp of rows (t, v), (t, 1); the rows become softmax · (1 + 2 z_loss lse), or 0 where not `kept` (t, 1)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    largest = logits.amax(dim=-1, keepdim=True).to(wide)
    exponentials = (logits.to(wide) - largest).exp_()
    total = exponentials.sum(dim=-1, keepdim=True)
    lse = total.log() + largest
    if want_gradient:
        logits.copy_(exponentials.mul_((1.0 + 2.0 * z_loss * lse) * kept / total))
    return lse


def losses_and_gradients(
    softmax: Softmax,
    hidden: torch.Tensor,  # (t, d)
    weight: torch.Tensor,  # (v, d)
    targets: torch.Tensor,  # (t,)
    ignore_index: int,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Loss of each token (t,), 0 where ignored; gradients of their sum in hidden, and in weight, the latter at least
    in float32; None where not needed."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    narrow_weight = weight.to(hidden.dtype)
    losses = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if need_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
    chunks = _chunks(hidden, weight)
    # Rows begin at multiples of 8 whatever the vocabulary: products and kernels load 16 bytes at a time.
    buffer = hidden.new_empty(len(targets[chunks[0]]) if chunks else 0, -(-weight.shape[0] // 8) * 8)
    for rows in chunks:
        logits = buffer[: len(targets[rows]), : weight.shape[0]]  # (t, v)
        torch.mm(hidden[rows], narrow_weight.t(), out=logits)
        losses[rows], grad = softmax(logits, targets[rows], ignore_index, z_loss, need_hidden or need_weight)
        if need_hidden:
            torch.mm(grad, narrow_weight, out=grad_hidden[rows])
        if need_weight:
            _add_product(grad_weight, grad, hidden[rows])
    return losses, grad_hidden, grad_weight


def _add_product(result: torch.Tensor, grad: torch.Tensor, hidden: torch.Tensor) -> None:
    """result (v, d) += gradᵀ hidden, for grad (t, v) and hidden (t, d): summed over the chunks in result's dtype."""
    if result.dtype == hidden.dtype:
        result.addmm_(grad.t(), hidden)
        return
    # A product in 16 bits is made where it stays in cache until it is added.
    rows = max(1, block_elements(result.device) // result.shape[1])
    for start in range(0, result.shape[0], rows):
        part = slice(start, start + rows)
        result[part] += grad[:, part].t() @ hidden


def _chunks(hidden: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    if hidden.device.type == "cpu":
        step = CPU_CHUNK_BYTES // (hidden.element_size() * weight.shape[0])
    else:
        step = CHUNK_BYTES // (4 * weight.shape[0])
    step = max(16, step)
    if step > 128:
        step -= step % 128  # matrix products come in tiles of that many rows
    return [slice(start, start + step) for start in range(0, hidden.shape[0], step)]
