"""The loss registered with torch.library, for both fast backends: torch.compile sees one operation, not every chunk."""

import torch

from mamba2.ops.cross_entropy.chunked import losses_and_gradients, torch_softmax
from mamba2.ops.cross_entropy.triton_softmax import triton_softmax
from mamba2.ops.gradient import register_gradient

SOFTMAX = {"torch": torch_softmax, "triton": triton_softmax}


@torch.library.custom_op("mamba2::linear_cross_entropy", mutates_args=())
def loss_op(
    hidden: torch.Tensor,  # (t, d)
    weight: torch.Tensor,  # (v, d)
    targets: torch.Tensor,  # (t,)
    ignore_index: int,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of the tokens' losses and its gradients, empty where not needed.

    The backward only scales what the forward has computed: three products, not four.
    """
    # Which dtype each product uses is decided here, not by an enclosing autocast.
    with torch.autocast(hidden.device.type, enabled=False):
        losses, grad_hidden, grad_weight = losses_and_gradients(
            SOFTMAX[backend], hidden, weight, targets, ignore_index, z_loss, need_hidden, need_weight
        )
    grads = (hidden.new_empty(0) if grad is None else grad for grad in (grad_hidden, grad_weight))
    return losses.sum(), *grads


@loss_op.register_fake
def _(hidden, weight, targets, ignore_index, z_loss, need_hidden, need_weight, backend):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    grad_hidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    grad_weight = torch.empty_like(weight, dtype=wide) if need_weight else hidden.new_empty(0)
    return hidden.new_empty((), dtype=wide), grad_hidden, grad_weight


def _setup_context(ctx, inputs, output):
    _, weight, *_, ctx.need_hidden, ctx.need_weight, _ = inputs
    ctx.weight_dtype = weight.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _backward(ctx, grad_output, *_):
    grad_hidden, grad_weight = ctx.saved_tensors
    no_more = (None,) * 6
    if grad_output is None:
        return None, None, *no_more
    # In the gradient's own precision: a factor like 1 / tokens must not be rounded to 16 bits.
    hidden = (grad_hidden.to(grad_output.dtype) * grad_output).to(grad_hidden.dtype) if ctx.need_hidden else None
    weight = (grad_weight * grad_output).to(ctx.weight_dtype) if ctx.need_weight else None
    return hidden, weight, *no_more


register_gradient(loss_op, _backward, _setup_context)


@torch.library.custom_op("mamba2::linear_token_losses", mutates_args=())
def token_losses_op(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int, backend: str
) -> torch.Tensor:
    """Loss of each token, (t,), 0 where the target is `ignore_index`."""
    with torch.autocast(hidden.device.type, enabled=False):
        return losses_and_gradients(SOFTMAX[backend], hidden, weight, targets, ignore_index, 0.0, False, False)[0]


@token_losses_op.register_fake
def _(hidden, weight, targets, ignore_index, backend):
    return hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
