"""Cross-entropy of a linear layer by chunks of tokens; the gradients are computed while the logits are there."""

import torch

# Logits of one chunk, in float32: small beside the weights of a 50k vocabulary, large enough for full-speed products.
CHUNK_BYTES = 64 * 2**20


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of the tokens' losses. The backward only scales what the forward has computed: three products, not four."""

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,  # (t, d)
        weight: torch.Tensor,  # (v, d)
        targets: torch.Tensor,  # (t,)
        ignore_index: int,
        z_loss: float,
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        narrow_weight = weight.to(hidden.dtype)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for rows in _chunks(hidden, weight):
            logits, lse, losses, kept = _chunk_losses(hidden[rows], narrow_weight, targets[rows], ignore_index)
            squares = torch.where(kept, lse.square(), torch.zeros_like(lse))
            total += losses.sum() + z_loss * squares.sum()
            if not (need_hidden or need_weight):
                continue
            # d loss / d logits = softmax · (1 + 2 z_loss lse) - onehot, written over the logits
            grad = logits.sub_(lse[:, None]).exp_()  # (rows, v)
            if z_loss:
                grad.mul_(1.0 + 2.0 * z_loss * lse[:, None])
            safe = torch.where(kept, targets[rows], 0)[:, None]
            grad.scatter_add_(1, safe, torch.full_like(safe, -1, dtype=wide))
            grad.masked_fill_(~kept[:, None], 0.0)
            grad = grad.to(hidden.dtype)
            if need_hidden:
                torch.mm(grad, narrow_weight, out=grad_hidden[rows])
            if need_weight:
                grad_weight += grad.t() @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden.to(grad_output.dtype) * grad_output).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_output).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def token_losses(
    hidden: torch.Tensor,  # (t, d)
    weight: torch.Tensor,  # (v, d)
    targets: torch.Tensor,  # (t,)
    ignore_index: int,
) -> torch.Tensor:
    """Loss of each token, (t,), 0 where the target is `ignore_index`."""
    weight = weight.to(hidden.dtype)
    losses = [_chunk_losses(hidden[rows], weight, targets[rows], ignore_index)[2] for rows in _chunks(hidden, weight)]
    return torch.cat(losses)


def _chunks(hidden: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    step = max(16, CHUNK_BYTES // (4 * weight.shape[0]))
    return [slice(start, start + step) for start in range(0, hidden.shape[0], step)]


def _chunk_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int):
    """Logits (t, v), their log-sum-exp (t,), losses (t,), all at least float32; and which tokens count (t,)."""
    kept = targets != ignore_index
    logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    lse = torch.logsumexp(logits, dim=-1)
    target_logits = logits.gather(1, torch.where(kept, targets, 0)[:, None])[:, 0]
    return logits, lse, torch.where(kept, lse - target_logits, torch.zeros_like(lse)), kept
