"""Functions of numbers that several kernels need, each written once. Exponentials are base 2."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp2(-z * LOG2E))


@triton.jit
def silu(z):
    return z / (1.0 + tl.exp2(-z * LOG2E))


@triton.jit
def silu_slope(z):
    """Derivative of silu."""
    s = sigmoid(z)
    return s * (1.0 + z * (1.0 - s))


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """The same stride, of which the compiler now knows that ALIGN divides it (see triton_launch.alignment)."""
    return stride // ALIGN * ALIGN
