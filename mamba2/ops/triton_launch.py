"""What the launchers of the block's smaller kernels share: accepted tensors, alignment."""

import math

import torch

from mamba2.ops.backend import TRITON_DTYPES


def require_kernel_tensors(**named: torch.Tensor | None) -> None:
    """Raise ValueError naming the first tensor that a kernel cannot take beside the first one: its dtype or device."""
    first, reference = next(iter(named.items()))
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.dtype not in TRITON_DTYPES:
            raise ValueError(f"the Triton backend takes {name} in float32, bfloat16 or float16, not {tensor.dtype}")
        if tensor.device != reference.device:
            raise ValueError(
                f"{name} is on {tensor.device} and {first} on {reference.device}; all must be on one device"
            )


def alignment(*tensors: torch.Tensor | None) -> int:
    """Elements, up to 8, that divide every stride of the tensors but the last.

    Triton knows a stride as aligned only if 16 divides it. The rows of a slice of in_proj's output often start at
    multiples of 8 elements and no more, and without this number each thread would load them one by one.
    """
    strides = [stride for t in tensors if t is not None for stride in t.stride()[:-1]]
    return math.gcd(8, *strides)
