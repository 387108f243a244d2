"""Which implementation an op runs: decided here and nowhere else.

A tensor on a GPU (CUDA or ROCm) goes to Triton, a tensor on the CPU to plain torch. MAMBA2_BACKEND=reference, torch or
triton overrides that for one run. Triton takes a CPU tensor only in its interpreter (TRITON_INTERPRET=1), as the tests
do.
"""

import os

import torch

BACKENDS = ("reference", "torch", "triton")


def choose_backend(tensor: torch.Tensor, available: tuple[str, ...]) -> str:
    """Name of the backend for an op whose first argument is `tensor`; `available` are the ones the op has.

    Raises ValueError when MAMBA2_BACKEND names none of them, or asks Triton for a tensor that it cannot reach.
    """
    asked = os.environ.get("MAMBA2_BACKEND", "")
    if not asked:
        return "triton" if tensor.is_cuda and "triton" in available else "torch"
    if asked not in BACKENDS:
        raise ValueError(f"MAMBA2_BACKEND={asked!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if asked not in available:
        raise ValueError(f"MAMBA2_BACKEND={asked!r} is not built for this op; it has {', '.join(available)}")
    if asked == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"MAMBA2_BACKEND=triton needs tensors on a GPU, this one is on {tensor.device}; "
            "set TRITON_INTERPRET=1 before starting Python to run the kernels in Triton's interpreter"
        )
    return asked
