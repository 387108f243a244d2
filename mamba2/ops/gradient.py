"""Derivatives other than a gradient. The fast forms are opaque to torch, which takes what it cannot see for zero.

So what is traced by forward-mode differentiation or by a transform of `torch.func` runs in the reference forms, which
are plain torch (`mamba2.ops.backend`). Where a fast form has been recorded already, it refuses to be differentiated
twice.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

ADVICE = "MAMBA2_BACKEND=reference computes them, slowly, in plain torch"


def is_transformed() -> bool:
    """Whether forward-mode differentiation or a transform of `torch.func` (vmap, grad, …) is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _is_batched(grad: torch.Tensor | None) -> bool:
    """Of `torch.autograd.grad(..., is_grads_batched=True)`, which is no transform of `torch.func`."""
    return grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)


def register_gradient(op: Callable, backward: Callable, setup_context: Callable) -> None:
    """`op.register_autograd` for a `backward` that can be run, but not itself be differentiated.

    Raises ValueError from the backward pass where that is tried.
    """

    def first_order(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        if is_transformed() or any(map(_is_batched, tree_leaves(grads))):
            raise ValueError(f"the fast forms have no batched gradients and no tangents of gradients; {ADVICE}")
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        once = _Once(ctx)  # create_graph=True
        with torch.no_grad():
            results = backward(once, *grads)
        return _Last.apply(len(results), *results, *once.saved_tensors, *tree_leaves(grads))

    op.register_autograd(first_order, setup_context=setup_context)


class _Once:
    """A context whose saved tensors are fetched once: activation checkpointing gives them out no second time."""

    def __init__(self, ctx: Any):
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Last(torch.autograd.Function):
    """The first of the values given, in a graph with the others, through which no second derivative goes."""

    @staticmethod
    def forward(ctx: Any, count: int, *values: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return values[:count]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        uses = "which torch.autograd.functional.jvp uses, too"
        raise ValueError(f"the fast forms have no second derivatives, {uses}; {ADVICE}")
