"""Chooses which implementation of an op runs.

CUDA and ROCm tensors go to the Triton kernels, if Triton is installed; CPU tensors, and inputs that the kernels do not
take (float64, a convolution wider than 8), to plain torch. MAMBA2_BACKEND=reference, torch or triton overrides this;
Triton then takes a CPU tensor only in its interpreter (TRITON_INTERPRET=1), as in the tests. Forward-mode
differentiation and the transforms of `torch.func` (jvp, vmap, grad, hessian, …) run the reference forms, slow but plain
torch operations.
"""

import os

import torch

from mamba2.ops.gradient import ADVICE, is_transformed
from mamba2.ops.language import HAS_TRITON

BACKENDS = ("reference", "torch", "triton")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose_backend(tensor: torch.Tensor, available: tuple[str, ...], kernel_fits: bool = True) -> str:
    """Name of the backend for an op whose first argument is `tensor`.

    Arguments: `available`: the backends that the op has; `kernel_fits`: whether its kernel takes the shapes given.

    Raises ValueError if MAMBA2_BACKEND is unknown or not available for the op, is triton for a tensor that is not on a
    GPU (outside the interpreter), or not reference under forward-mode differentiation or a transform of `torch.func`.
    """
    asked = os.environ.get("MAMBA2_BACKEND", "")
    transformed = is_transformed()
    if not asked and transformed:
        return "reference"
    if not asked:
        fits = HAS_TRITON and kernel_fits and "triton" in available and tensor.dtype in TRITON_DTYPES
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
