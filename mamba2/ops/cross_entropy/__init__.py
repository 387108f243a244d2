"""The language model's head and its loss in one, a few tokens at a time, so that the logits never exist whole.

    loss = Σ_t  log Σ_v exp(logits_tv) - logits_{t,target_t}        logits = hidden · weightᵀ

At vocabulary 50 280 and a batch of 59 392 tokens the logits alone would take 11 GiB in float32.
"""

import torch

from mamba2.ops.backend import choose_backend
from mamba2.ops.cross_entropy.op import SOFTMAX, loss_op, token_losses_op
from mamba2.ops.cross_entropy.reference import token_losses_reference
from mamba2.ops.gradient import is_transformed
from mamba2.ops.triton_launch import require_kernel_tensors

IGNORE_INDEX = -100


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int = IGNORE_INDEX,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """Sum over tokens of the cross-entropy of `hidden @ weight.T`, in nats, differentiable in hidden and weight.

    Arguments (v vocabulary, d hidden size):
        hidden: (..., d), floating; the products run in its dtype, the softmax and every sum in float32.
        weight: (v, d).
        targets: (...) int64, each in [0, v) or `ignore_index`, whose tokens count nothing.
        z_loss: weight of the added penalty z_loss · Σ_t (log Σ_v exp(logits_tv))² (Chowdhery et al. 2022, section 5).

    Returns a float32 scalar: a sum and not a mean, so that a batch can be split in any way and divided once.
    Raises ValueError for shapes and dtypes that do not fit and for a target outside the vocabulary (from a compiled
    model torch's RuntimeError); the Triton backend, whose kernels cannot raise, returns NaN instead.
    """
    backend, hidden, targets = _prepare(hidden, weight, targets, ignore_index)
    if backend == "reference":
        return token_losses_reference(hidden, weight, targets, ignore_index, z_loss).sum()
    need_hidden, need_weight = (torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight))
    return loss_op(hidden, weight, targets, ignore_index, z_loss, need_hidden, need_weight, backend)[0]


def linear_token_losses(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int = IGNORE_INDEX
) -> torch.Tensor:
    """Cross-entropy of each token, (...) float32 in nats, 0 where ignored. For evaluation: carries no gradient.

    Arguments and errors are those of `linear_cross_entropy`.
    """
    shape = targets.shape
    backend, hidden, targets = _prepare(hidden, weight, targets, ignore_index)
    with torch.no_grad():
        if backend == "reference":
            return token_losses_reference(hidden, weight, targets, ignore_index, 0.0).view(shape)
        return token_losses_op(hidden, weight, targets, ignore_index, backend).view(shape)


def _prepare(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int
) -> tuple[str, torch.Tensor, torch.Tensor]:
    """Check the arguments; the backend, hidden as (t, d) and targets as (t,)."""
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must have shape (vocab, {hidden.shape[-1]}), not {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must have shape {tuple(hidden.shape[:-1])}, not {tuple(targets.shape)}")
    if 0 <= ignore_index < weight.shape[0]:
        raise ValueError(
            f"ignore_index {ignore_index} is a valid target; choose a value outside [0, {weight.shape[0]})"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, not {targets.dtype}")
    backend = choose_backend(hidden, ("reference", *SOFTMAX))
    if backend == "triton":
        require_kernel_tensors(hidden=hidden, weight=weight)
    elif targets.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed():
        outside = (targets != ignore_index) & ((targets < 0) | (targets >= weight.shape[0]))
        if outside.any():
            raise ValueError(f"the target {targets[outside][0]} is outside the vocabulary of {weight.shape[0]}")
    return backend, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
