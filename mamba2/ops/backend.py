"""Which implementation an op runs: decided here and nowhere else.

A CUDA or ROCm tensor goes to the Triton kernels, a CPU tensor to plain torch, and so does what the kernels do not take
(float64, a convolution wider than 8). MAMBA2_BACKEND=reference, torch or triton overrides this for a run; Triton then
takes a CPU tensor only in its interpreter (TRITON_INTERPRET=1), as the tests do. Forward-mode differentiation and the
transforms of `torch.func` (jvp, vmap, grad, hessian, …) run the reference forms: slow, but torch sees into them.
"""

import os

import torch

from mamba2.ops.gradient import ADVICE, is_transformed

BACKENDS = ("reference", "torch", "triton")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose_backend(tensor: torch.Tensor, available: tuple[str, ...], kernel_fits: bool = True) -> str:
    """Name of the backend for an op whose first argument is `tensor`.

    Arguments: `available` are the backends that the op has; `kernel_fits` says whether its kernel takes the shapes at
    hand, where that is not a matter of course.

    Raises ValueError when MAMBA2_BACKEND names none of them, or asks Triton for a tensor that it cannot reach, or any
    but the reference for derivatives that it does not have.
    """
    asked = os.environ.get("MAMBA2_BACKEND", "")
    transformed = is_transformed()
    if not asked and transformed:
        return "reference"
    if not asked:
        fits = kernel_fits and "triton" in available and tensor.dtype in TRITON_DTYPES
        return "triton" if tensor.is_cuda and fits else "torch"
    if asked not in BACKENDS:
        raise ValueError(f"MAMBA2_BACKEND={asked!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if asked not in available:
        raise ValueError(f"MAMBA2_BACKEND={asked!r} is not built for this op; it has {', '.join(available)}")
    if asked != "reference" and transformed:
        raise ValueError(
            f"MAMBA2_BACKEND={asked!r} has no forward-mode derivatives and no transforms of torch.func; "
            f"{ADVICE}, and so does leaving it unset"
        )
    if asked == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"MAMBA2_BACKEND=triton needs tensors on a GPU, this one is on {tensor.device}; "
            "set TRITON_INTERPRET=1 before starting Python to run the kernels in Triton's interpreter"
        )
    return asked
