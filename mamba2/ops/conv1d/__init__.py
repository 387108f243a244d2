"""Causal depthwise convolution over time with SiLU: what each token of x, B and C sees of its last few predecessors.

y_t = silu(bias + Σ_{k<K} weight_k x_{t-(K-1)+k})        x_t = 0 before the sequence (or from `initial_state`)
"""

import torch

from mamba2.ops.backend import choose_backend
from mamba2.ops.conv1d.blocked import causal_conv1d_blocked
from mamba2.ops.conv1d.reference import causal_conv1d_reference, causal_conv1d_step_reference
from mamba2.ops.conv1d.triton_op import MAX_WIDTH, causal_conv1d_triton

IMPLEMENTATIONS = {
    "reference": causal_conv1d_reference,
    "torch": causal_conv1d_blocked,
    "triton": causal_conv1d_triton,
}


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    activation: bool = True,
    return_final_state: bool = False,
    splits: tuple[int, ...] | None = None,
) -> torch.Tensor | tuple:
    """Causal depthwise convolution of width K and, with `activation`, SiLU; sums in float32.

    Arguments (b batch, l seqlen, d channels; any strides):
        x: (b, l, d), floating.
        weight: (d, K), the last column multiplies the current token.
        bias: (d,) or None.
        seq_idx: (b, l) integers or None. A token sees nothing from before the last change of value.
        initial_state: (b, K - 1, d), the inputs before the first token, or None for zeros.
        return_final_state: also return the last K - 1 inputs (b, K - 1, d), those of earlier documents set to zero, so
            that feeding them to the next segment equals one long sequence.
        splits: widths whose sum is d, to have y in as many pieces (b, l, width). Unlike `y.split(splits, -1)` it costs
            nothing: the backward takes the gradients of the pieces as they are, where split's own joins them first.

    Returns y (b, l, d) in x's dtype, or the tuple of its pieces; with `return_final_state` a pair of that and the last
    inputs. Follows `causal_conv1d_fn` of the causal-conv1d package, channels last.
    Raises ValueError naming the argument whose shape does not fit, or dtype where the backend is Triton.
    """
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x must have shape (batch, seqlen, channels) with no empty dimension, not {tuple(x.shape)}")
    b, l, d = x.shape
    if weight.dim() != 2 or weight.shape[0] != d or weight.shape[1] < 1:
        raise ValueError(f"weight must have shape ({d}, width), not {tuple(weight.shape)}")
    width = weight.shape[1]
    for name, tensor, shape in (
        ("bias", bias, (d,)),
        ("seq_idx", seq_idx, (b, l)),
        ("initial_state", initial_state, (b, width - 1, d)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")
    pieces = (d,) if splits is None else tuple(splits)
    if sum(pieces) != d or min(pieces) < 1:
        raise ValueError(f"splits must be positive widths that sum to the {d} channels of x, not {pieces}")
    backend = choose_backend(x, tuple(IMPLEMENTATIONS), kernel_fits=width <= MAX_WIDTH)
    implementation = IMPLEMENTATIONS[backend]
    ys, final_state = implementation(x, weight, bias, seq_idx, initial_state, activation, return_final_state, pieces)
    y = ys[0] if splits is None else ys
    return (y, final_state) if return_final_state else y


@torch.no_grad()
def causal_conv1d_step(
    window: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: bool = True,
) -> torch.Tensor:
    """Move `window` on in place by one token and return the convolution's output for it, (b, d) in x's dtype.

    Arguments: window (b, K - 1, d), the last inputs, as `causal_conv1d` returns them; x (b, d); weight (d, K); bias
    (d,) or None. A handful of torch operations on every device.

    Raises ValueError naming the argument whose shape does not fit.
    """
    b, d = x.shape
    if weight.dim() != 2 or weight.shape[0] != d:
        raise ValueError(f"weight must have shape ({d}, width), not {tuple(weight.shape)}")
    if tuple(window.shape) != (b, weight.shape[1] - 1, d):
        raise ValueError(f"window must have shape {(b, weight.shape[1] - 1, d)}, not {tuple(window.shape)}")
    return causal_conv1d_step_reference(window, x, weight, bias, activation)
