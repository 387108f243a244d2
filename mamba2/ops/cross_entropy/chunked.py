"""Cross-entropy of a linear layer by chunks of tokens; the gradients are computed while the logits are there.

The products are torch's. What lies between them, from logits to their gradient, is `torch_softmax` here or the Triton
kernel of `triton_softmax.py`.
"""

from collections.abc import Callable

import torch

# Logits of one chunk, in float32. Not smaller, because every chunk also reads and writes the whole gradient of the
# weight: with this size, at a vocabulary of 50 280 in 16 bits, half of what the products and the softmax move.
CHUNK_BYTES = 128 * 2**20

# (logits (t, v), targets (t,), ignore_index, z_loss, whether the gradient is wanted) -> losses (t,), at least float32,
# and the gradient of their sum in the logits, in the logits' dtype, or None. May overwrite the logits.
Softmax = Callable[[torch.Tensor, torch.Tensor, int, float, bool], tuple[torch.Tensor, torch.Tensor | None]]


def torch_softmax(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, z_loss: float, want_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    dtype = logits.dtype
    kept = targets != ignore_index
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    lse = torch.logsumexp(logits, dim=-1)  # (t,)
    safe = torch.where(kept, targets, 0)[:, None]
    losses = lse - logits.gather(1, safe)[:, 0] + z_loss * lse.square()
    losses = torch.where(kept, losses, torch.zeros_like(losses))
    if not want_gradient:
        return losses, None
    # d loss / d logits = softmax · (1 + 2 z_loss lse) - onehot, written over the logits
    grad = logits.sub_(lse[:, None]).exp_()  # (t, v)
    if z_loss:
        grad.mul_(1.0 + 2.0 * z_loss * lse[:, None])
    grad.scatter_add_(1, safe, torch.full_like(safe, -1, dtype=grad.dtype))
    grad.masked_fill_(~kept[:, None], 0.0)
    return losses, grad.to(dtype)


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
        if need_weight and hidden.dtype == wide:
            grad_weight.addmm_(grad.t(), hidden[rows])
        elif need_weight:
            grad_weight += grad.t() @ hidden[rows]
    return losses, grad_hidden, grad_weight


def _chunks(hidden: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    step = max(16, CHUNK_BYTES // (4 * weight.shape[0]))
    if step > 128:
        step -= step % 128  # matrix products come in tiles of that many rows
    return [slice(start, start + step) for start in range(0, hidden.shape[0], step)]
