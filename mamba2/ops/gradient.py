"""Gradients of the fast forms, and errors for other derivatives, which torch would otherwise take for zero.

Under forward-mode differentiation or a transform of `torch.func` the ops run their reference forms, which are plain
torch (`mamba2.ops.backend`). A second derivative through a fast form raises ValueError.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

ADVICE = "MAMBA2_BACKEND=reference computes them, slowly, in plain torch"


def is_transformed() -> bool:
    """Whether forward-mode differentiation or a transform of `torch.func` (vmap, grad, …) is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _is_batched(grad: torch.Tensor | None) -> bool:
    """Whether it comes from `torch.autograd.grad(..., is_grads_batched=True)`, no transform of `torch.func`."""
    return grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)


def _flat(grads: tuple) -> list[torch.Tensor | None]:
    """One list of tensors from tensors and lists of tensors; `tree_leaves` takes as long as a launch."""
    return [g for grad in grads for g in (grad if isinstance(grad, (list, tuple)) else (grad,))]


def register_gradient(op: Callable, backward: Callable, setup_context: Callable) -> Callable:
    """`op.register_autograd` for a `backward` that cannot itself be differentiated.

    Returns a function to call in place of `op`. It skips torch's dispatcher, which takes longer than a launch, unless
    `is_watched` says that the dispatcher is needed.

    `backward` takes the context and the gradient of each result, lists of results flattened. Asking for a second
    derivative raises ValueError.
    """

    def first_order(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        grads = _flat(grads)
        if is_transformed() or any(map(_is_batched, grads)):
            raise ValueError(f"the fast forms have no batched gradients and no tangents of gradients; {ADVICE}")
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        once = _Once(ctx)  # create_graph=True
        with torch.no_grad():
            results = backward(once, *grads)
        return _Last.apply(len(results), *results, *once.saved_tensors, *grads)

    op.register_autograd(first_order, setup_context=setup_context)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, ...]:
            outputs = op._init_fn(*args)
            setup_context(ctx, args, outputs)
            return outputs if isinstance(outputs, torch.Tensor) else tuple(outputs)

        backward = staticmethod(first_order)

    def call(*args: Any) -> Any:
        if is_watched(args):
            return op(*args)
        return Direct.apply(*args) if torch.is_grad_enabled() else op._init_fn(*args)

    return call


def unwatched(op: Callable) -> Callable:
    """The function to call in place of an `op` without a gradient; skips the dispatcher as above."""
    return lambda *args: op(*args) if is_watched(args) else op._init_fn(*args)


# Types of arguments that need no dispatcher; subclasses of tensors do.
PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, tuple, list}


def is_watched(args: tuple) -> bool:
    """Whether a compiler, dispatch mode, transform or tensor subclass must see a call in torch's dispatcher."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or is_transformed():
        return True
    return not PLAIN.issuperset(map(type, args))


def empty_gradients(*inputs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Uninitialised outputs of a backward op: a tensor like each input, without elements where that is None."""
    return tuple(inputs[0].new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


class _Once:
    """A context that fetches its saved tensors once: under activation checkpointing they cannot be fetched again."""

    def __init__(self, ctx: Any):
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Last(torch.autograd.Function):
    """Returns the first `count` values. Differentiating them with respect to any of the values raises ValueError."""

    @staticmethod
    def forward(ctx: Any, count: int, *values: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return values[:count]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        uses = "which torch.autograd.functional.jvp uses, too"
        raise ValueError(f"the fast forms have no second derivatives, {uses}; {ADVICE}")
