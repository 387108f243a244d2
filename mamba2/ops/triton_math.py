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
def softplus(raw):
    """log(1 + exp(raw)) to within float32's rounding.

    Near raw = -7, where steps of 1e-3 come from, 1 + exp(raw) has lost half of exp(raw)'s digits. Up to exp(raw) =
    1/4 the series 2 atanh(s), s = e / (2 + e), is used: its first omitted term is below 1e-9 of the result.
    """
    e = tl.exp2(tl.minimum(raw, 20.0) * LOG2E)
    s = e / (2.0 + e)
    s2 = s * s
    series = 2.0 * s * (1.0 + s2 * (1.0 / 3.0 + s2 * (1.0 / 5.0 + s2 * (1.0 / 7.0 + s2 * (1.0 / 9.0)))))
    direct = tl.log(1.0 + e)
    return tl.where(raw > 20.0, raw, tl.where(e < 0.25, series, direct))


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """The same stride, of which the compiler now knows that ALIGN divides it (see triton_launch.alignment)."""
    return stride // ALIGN * ALIGN
