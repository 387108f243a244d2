"""The Triton backend of `causal_conv1d`: allocation, launches, and registration with torch.library.

Forward one launch, backward two: the gradients, and the sums over programs of those of weight and bias.
"""

import torch
import triton

from mamba2.ops.conv1d.triton_kernels import _backward_kernel, _forward_kernel
from mamba2.ops.device import multiprocessors
from mamba2.ops.triton_launch import alignment, power_of_two, require_kernel_tensors
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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `mamba2.ops.causal_conv1d`. Returns y (b, l, d) and, if asked for, the last K - 1 inputs (b, K - 1, d)."""
    require_kernel_tensors(x=x, weight=weight, bias=bias, initial_state=initial_state)
    if weight.shape[1] > MAX_WIDTH:
        raise ValueError(
            f"the Triton backend takes weight of width 1 to {MAX_WIDTH}, not {weight.shape[1]}; "
            "MAMBA2_BACKEND=torch takes any"
        )
    y, final = _forward_op(x, weight, bias, seq_idx, initial_state, activation, return_final_state)
    return y, final if return_final_state else None


@torch.library.custom_op("mamba2::causal_conv1d_forward", mutates_args=())
def _forward_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    initial: torch.Tensor | None,
    activation: bool,
    want_final: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the last K - 1 inputs, which are empty where not wanted."""
    y, final = _forward_outputs(x, weight, want_final)
    grid, tokens, constants = _launch(x, weight, x, extras=0)
    with torch.cuda.device_of(x):
        _forward_kernel[grid](
            x,
            weight,
            bias,
            seq_idx,
            initial,
            y,
            final if want_final else None,
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
    return y, final


@_forward_op.register_fake
def _(x, weight, bias, seq_idx, initial, activation, want_final):
    return _forward_outputs(x, weight, want_final)


def _forward_outputs(x, weight, want_final):
    b, l, d = x.shape
    return x.new_empty(b, l, d), x.new_empty((b, weight.shape[1] - 1, d) if want_final else (0,))


@torch.library.custom_op("mamba2::causal_conv1d_backward", mutates_args=())
def _backward_op(
    dy: torch.Tensor,
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
    grid, tokens, constants = _launch(x, weight, dy, extras=(seq_idx is not None) + (initial is not None))
    columns = weight.numel() + (0 if bias is None else d)
    partial = x.new_empty(b * triton.cdiv(l, tokens), columns, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _backward_kernel[grid](
            dy,
            dfinal,
            x,
            weight,
            bias,
            seq_idx,
            initial,
            dx,
            None if initial is None else dinitial,
            partial,
            dy.stride(),
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
def _(dy, dfinal, x, weight, bias, seq_idx, initial, activation):
    return _backward_outputs(x, weight, bias, initial)


def _backward_outputs(*inputs):
    return tuple(inputs[0].new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation, _want_final = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy, dfinal):
    x, weight, bias, seq_idx, initial = ctx.saved_tensors
    if dy is None:
        dy = x.new_zeros(()).expand(x.shape)
    dx, dweight, dbias, dinitial = _backward_op(dy, dfinal, x, weight, bias, seq_idx, initial, ctx.activation)
    return dx, dweight, None if bias is None else dbias, None, None if initial is None else dinitial, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _launch(
    x: torch.Tensor, weight: torch.Tensor, other: torch.Tensor, extras: int
) -> tuple[tuple[int, int], int, dict]:
    """Grid, tokens per program and compile-time values; `other` is read beside x.

    `extras`: how many of documents and windows the backward has to follow.

    Tokens per program: as many as leave 16 programs of two warps for each multiprocessor, so that the partial sums and
    the tokens that two programs load are few: 32 at least, where they cost a fifth, and 256 at most.
    """
    b, l, d = x.shape
    width = weight.shape[1]
    channels = min(CHANNELS, power_of_two(d))
    tiles = triton.cdiv(d, channels)
    share = b * l * tiles // (16 * multiprocessors(x.device))
    tokens = min(256, power_of_two(max(32, share)))
    constants = {
        "d": d,
        "K": width,
        "C": channels,
        # More rows are more loads in flight, and more scalar addresses and masks: some targets spill them.
        "ROWS": 2 if extras == 2 else 4,
        "ALIGN": alignment(x, other),
        # Four channels per thread at 128 registers or fewer. Each tap costs the backward four registers per channel,
        # documents or windows as much again: two channels per thread then.
        "num_warps": 2 if width <= 4 and extras == 0 else 4,
    }
    return (tiles * triton.cdiv(l, tokens), b), tokens, constants


def _strides(tensor: torch.Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if tensor is None else tensor.stride()
