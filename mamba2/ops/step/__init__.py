"""One token of what `ssd` and `causal_conv1d` do to a sequence, the state advanced in place: decoding.

    h' = exp(dt A) h + dt x ⊗ B        y = h' C + D x        optionally y · silu(z)

Time and memory do not depend on how many tokens came before. No gradients: train with `ssd` and `causal_conv1d`.
"""

import math

import torch

from mamba2.ops.backend import choose_backend
from mamba2.ops.step.reference import causal_conv1d_step_reference, ssd_step_reference
from mamba2.ops.step.triton_op import ssd_step_triton

# Token by token the plain form is also the one that runs; `mamba2.decoder` has a faster one for a whole model.
IMPLEMENTATIONS = {"reference": ssd_step_reference, "torch": ssd_step_reference, "triton": ssd_step_triton}


@torch.no_grad()
def ssd_step(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> torch.Tensor:
    """Advance `state` in place by one token and return y: (b, h, p) in x's dtype.

    Arguments (b batch, h nheads, p headdim, g ngroups, n d_state; any strides):
        state: (b, h, p, n) float32 or wider, as `ssd` returns it.
        x: (b, h, p); dt: (b, h) before bias and activation; B, C: (b, g, n).
        A, D, z, dt_bias, dt_softplus, dt_limit: as in `mamba2.ops.ssd`, z being (b, h, p).

    Raises ValueError naming the argument whose shape does not fit, or dtype where the backend is Triton.
    """
    if x.dim() != 3 or 0 in x.shape or B.dim() != 3 or 0 in B.shape:
        raise ValueError(f"x must be (batch, nheads, headdim) and B (batch, ngroups, d_state), not {_shapes(x, B)}")
    b, h, p = x.shape
    g, n = B.shape[1:]
    if h % g:
        raise ValueError(f"the {h} heads of x cannot be divided among the {g} groups of B")
    wanted = {
        "state": (state, (b, h, p, n)),
        "dt": (dt, (b, h)),
        "A": (A, (h,)),
        "B": (B, (b, g, n)),
        "C": (C, (b, g, n)),
        "z": (z, (b, h, p)),
        "dt_bias": (dt_bias, (h,)),
        "D": (D, (h, p) if D is not None and D.dim() == 2 else (h,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")
    implementation = IMPLEMENTATIONS[choose_backend(x, tuple(IMPLEMENTATIONS))]
    with torch.autocast(x.device.type, enabled=False):
        return implementation(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit)


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


def _shapes(*tensors: torch.Tensor) -> str:
    return " and ".join(str(tuple(t.shape)) for t in tensors)
