"""The Triton backend of `causal_conv1d`: allocation, launches, and registration with torch.library.

Forward one launch, backward two: the gradients, and the sums over programs of those of weight and bias. Pieces of the
result are tensors of their own and so are their gradients: nothing is joined in between.
"""

from collections.abc import Sequence

import torch
import triton

from mamba2.ops.conv1d.triton_kernels import _backward_kernel, _forward_kernel
from mamba2.ops.device import multiprocessors
from mamba2.ops.gradient import register_gradient
from mamba2.ops.triton_launch import alignment, require_kernel_tensors
from mamba2.ops.triton_reduce import sum_rows

MAX_WIDTH = 8  # the window and its gradients are held in registers

# Channels of a program: 4 per thread of two warps, loads of 8 bytes each in 16-bit input.
CHANNELS = 256


def causal_conv1d_triton(
    x: torch.Tensor,  # (b, l, d)
    weight: torch.Tensor,  # (d, K)
    bias: torch.Tensor | None,  # (d,)
    seq_idx: torch.Tensor | None,  # (b, l)
    initial_state: torch.Tensor | None,  # (b, K - 1, d)
    activation: bool,
    return_final_state: bool,
    splits: tuple[int, ...],
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """See `mamba2.ops.causal_conv1d`. Returns the pieces of y and, if asked for, the last K - 1 inputs."""
    require_kernel_tensors(x=x, weight=weight, bias=bias, initial_state=initial_state)
    if weight.shape[1] > MAX_WIDTH:
        raise ValueError(
            f"the Triton backend takes weight of width 1 to {MAX_WIDTH}, not {weight.shape[1]}; "
            "MAMBA2_BACKEND=torch takes any"
        )
    *ys, final = _forward_op(x, weight, bias, seq_idx, initial_state, activation, return_final_state, splits)
    return tuple(ys), final if return_final_state else None


@torch.library.custom_op("mamba2::causal_conv1d_forward", mutates_args=())
def _forward_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    initial: torch.Tensor | None,
    activation: bool,
    want_final: bool,
    splits: Sequence[int],
) -> list[torch.Tensor]:
    """The pieces of y and the last K - 1 inputs, which are empty where not wanted."""
    *ys, final = outputs = _forward_outputs(x, weight, want_final, splits)
    grid, tokens, constants = _launch(x, weight, ys, seq_idx, initial, backward=False)
    with torch.cuda.device_of(x):
        _forward_kernel[grid](
            x,
            weight,
            bias,
            seq_idx,
            initial,
            tuple(ys),
            final if want_final else None,
            tuple(y.stride() for y in ys),
            x.stride(),
            weight.stride(),
            0 if bias is None else bias.stride(0),
            _strides(seq_idx, 2),
            _strides(initial, 3),
            x.shape[1],
            tokens,
            **constants,
            ACTIVATION=activation,
        )
    return outputs


@_forward_op.register_fake
def _(x, weight, bias, seq_idx, initial, activation, want_final, splits):
    return _forward_outputs(x, weight, want_final, splits)


def _forward_outputs(x, weight, want_final, splits):
    b, l, d = x.shape
    final = x.new_empty((b, weight.shape[1] - 1, d) if want_final else (0,))
    return [*(x.new_empty(b, l, width) for width in splits), final]


@torch.library.custom_op("mamba2::causal_conv1d_backward", mutates_args=())
def _backward_op(
    dys: Sequence[torch.Tensor],
    dfinal: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    initial: torch.Tensor | None,
    activation: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight, bias and initial; empty for those not given."""
    grads = dx, dweight, dbias, dinitial = _backward_outputs(x, weight, bias, initial)
    b, l, d = x.shape
    grid, tokens, constants = _launch(x, weight, dys, seq_idx, initial, backward=True)
    columns = weight.numel() + (0 if bias is None else d)
    partial = x.new_empty(b * triton.cdiv(l, tokens), columns, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _backward_kernel[grid](
            tuple(dys),
            dfinal,
            x,
            weight,
            bias,
            seq_idx,
            initial,
            dx,
            None if initial is None else dinitial,
            partial,
            tuple(dy.stride() for dy in dys),
            _strides(dfinal, 3),
            x.stride(),
            weight.stride(),
            0 if bias is None else bias.stride(0),
            _strides(seq_idx, 2),
            _strides(initial, 3),
            l,
            tokens,
            **constants,
            ACTIVATION=activation,
        )
        sum_rows(partial, dweight, None if bias is None else dbias)
    return grads


@_backward_op.register_fake
def _(dys, dfinal, x, weight, bias, seq_idx, initial, activation):
    return _backward_outputs(x, weight, bias, initial)


def _backward_outputs(*inputs):
    return tuple(inputs[0].new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation, _want_final, ctx.splits = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx, grads):
    x, weight, bias, seq_idx, initial = ctx.saved_tensors
    *dys, dfinal = grads
    if any(dy is None for dy in dys):
        zero = x.new_zeros(())
        dys = [zero.expand(*x.shape[:2], width) if dy is None else dy for dy, width in zip(dys, ctx.splits)]
    dx, dweight, dbias, dinitial = _backward_op(dys, dfinal, x, weight, bias, seq_idx, initial, ctx.activation)
    # seq_idx, the flags and the splits have none.
    return dx, dweight, None if bias is None else dbias, None, None if initial is None else dinitial, None, None, None


register_gradient(_forward_op, _backward, _setup_context)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    pieces: Sequence[torch.Tensor],
    seq_idx: torch.Tensor | None,
    initial: torch.Tensor | None,
    backward: bool,
) -> tuple[tuple[int, int], int, dict]:
    """Grid, tokens per program and compile-time values; `pieces` are what is read or written beside x.

    Tokens per program: as many as leave 16 programs of two warps for each multiprocessor, so that the partial sums and
    the tokens that two programs load are few: 32 at least, where they cost a fifth, and 256 at most.
    """
    b, l, d = x.shape
    width = weight.shape[1]
    channels = min(CHANNELS, triton.next_power_of_2(d))
    widths = tuple(piece.shape[2] for piece in pieces)
    tiles = sum(triton.cdiv(width, channels) for width in widths)
    share = b * l * tiles // (16 * multiprocessors(x.device))
    tokens = min(256, triton.next_power_of_2(max(32, share)))
    extras = (seq_idx is not None) + (initial is not None)
    constants = {
        "WIDTHS": widths,
        "K": width,
        "C": channels,
        # More rows are more loads in flight, and more scalar addresses and masks: some targets spill them.
        "ROWS": 2 if extras == 2 else 4,
        "ALIGN": alignment(x, *pieces),
        # Four channels per thread at 128 registers or fewer. Each tap costs the backward four registers per channel,
        # documents or windows as much again: two channels per thread then.
        "num_warps": 2 if width <= 4 and not (backward and extras) else 4,
    }
    return (tiles * triton.cdiv(l, tokens), b), tokens, constants


def _strides(tensor: torch.Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if tensor is None else tensor.stride()
