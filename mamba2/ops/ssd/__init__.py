"""State-space duality (SSD): the sequence mixer of Mamba-2.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t ⊗ B_t        y_t = h_t C_t + D x_t        optionally y_t · silu(z_t)

`reference.py` computes it token by token; `chunked.py` computes the same by chunks with matrix products (Dao & Gu 2024,
arXiv:2405.21060, section 6) and is the form to read; `blocked.py` is its fast version, the torch backend; `op.py`
launches the GPU kernels, which `docs/kernels.md` explains.
"""

import math

import torch

from mamba2.ops.backend import choose_backend
from mamba2.ops.documents import document_numbers
from mamba2.ops.ssd.blocked import ssd_blocked
from mamba2.ops.ssd.documents import document_states
from mamba2.ops.ssd.op import ssd_triton
from mamba2.ops.ssd.reference import SSDInputs, ssd_reference

IMPLEMENTATIONS = {"reference": ssd_reference, "torch": ssd_blocked, "triton": ssd_triton}


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Selective state-space scan with a scalar decay per head, differentiable in every floating tensor.

    Arguments (b batch, l seqlen, h nheads, p headdim, g ngroups, n d_state; any strides; floating dtype unless noted):
        x: (b, l, h, p) input. Its dtype is the dtype of the result.
        dt: (b, l, h) step before bias and activation; the step used is clamp(softplus(dt + dt_bias), *dt_limit).
        A: (h,) decay rate per unit of dt, negative.
        B, C: (b, l, g, n) input and output projections; head i uses group i // (h / g).
        chunk_size: tokens per chunk, at least 1. Changes rounding and cost, not the result; the Triton kernels choose
            their own.
        D: (h,) or (h, p) skip weight, or None.
        z: (b, l, h, p) gate, or None: the result is multiplied by silu(z).
        dt_bias: (h,) added to dt, or None.
        initial_states: (b, h, p, n) state before the first token, or None for zeros.
        seq_idx: (b, l) integers, or None. The state is reset to zero before each token whose value differs from that
            of the token before it; `initial_states` belongs to the first token's document.
        cu_seqlens: (documents + 1,) int32 or int64, or None: 0, then where each document ends, the last one at l, for
            documents one after another in a batch of 1. In place of `seq_idx`, and without `initial_states`. Wrong
            values are refused on a CPU and fail an assertion on a GPU; equal neighbours are an empty document.
        dt_softplus: apply softplus to dt + dt_bias.
        dt_limit: (low, high), the range that the step is clamped to.
        return_final_states: also return the state after the last token; with `cu_seqlens` that after each document.

    Returns y: (b, l, h, p) in x's dtype, and with `return_final_states` the state (b, h, p, n), in float32 (float64 for
    float64 input); with `cu_seqlens` the states (documents, h, p, n), zeros after an empty document. Argument names and
    meanings follow mamba-ssm's `mamba_chunk_scan_combined`, except that there `cu_seqlens` only says which states to
    return, as `varlen_states`, and `seq_idx` must say where to reset.

    Raises ValueError naming the argument whose shape, dtype or device does not fit.
    """
    inputs = SSDInputs(
        x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit, return_final_states
    )
    _check(inputs)
    if cu_seqlens is not None:
        numbers = document_numbers(cu_seqlens, x, seq_idx=seq_idx, initial_states=initial_states)
        inputs = inputs._replace(seq_idx=numbers, return_final_states=False)
    implementation = IMPLEMENTATIONS[choose_backend(x, tuple(IMPLEMENTATIONS))]
    # Which dtype each product uses is decided in the implementations, not by an enclosing autocast.
    with torch.autocast(x.device.type, enabled=False):
        y, final_states = implementation(inputs)
        if cu_seqlens is not None and return_final_states:
            final_states = document_states(inputs, cu_seqlens)
    return (y, final_states) if return_final_states else y


def _check(inputs: SSDInputs) -> None:
    x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, _, (low, high), _ = inputs
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"x must have shape (batch, seqlen, nheads, headdim) with no empty dimension, not {_shape(x)}")
    b, l, h, p = x.shape
    if B.dim() != 4 or 0 in B.shape or B.shape[:2] != (b, l):
        raise ValueError(f"B must have shape ({b}, {l}, ngroups, d_state), not {_shape(B)}")
    g, n = B.shape[2:]
    if h % g != 0:
        raise ValueError(f"the {h} heads of x cannot be divided among the {g} groups of B")
    _expect_shape("dt", dt, (b, l, h))
    _expect_shape("A", A, (h,))
    _expect_shape("C", C, (b, l, g, n))
    if D is not None and D.shape != (h,) and D.shape != (h, p):
        raise ValueError(f"D must have shape ({h},) or ({h}, {p}), not {_shape(D)}")
    for name, tensor, shape in (
        ("z", z, (b, l, h, p)),
        ("dt_bias", dt_bias, (h,)),
        ("initial_states", initial_states, (b, h, p, n)),
        ("seq_idx", seq_idx, (b, l)),
    ):
        if tensor is not None:
            _expect_shape(name, tensor, shape)
    tensors = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
    named = {name: getattr(inputs, name) for name in tensors}
    for name, tensor in named.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating-point dtype, not {tensor.dtype}")
    for name, tensor in (("B", B), ("C", C), ("z", z)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} must have the dtype of x, {x.dtype}, not {tensor.dtype}")
    if seq_idx is not None and (seq_idx.is_floating_point() or seq_idx.is_complex() or seq_idx.dtype == torch.bool):
        raise ValueError(f"seq_idx must be of an integer dtype, not {seq_idx.dtype}")
    for name, tensor in {**named, "seq_idx": seq_idx}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; all must be on one device")
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive integer, not {chunk_size!r}")
    if not 0.0 <= low <= high:
        raise ValueError(f"dt_limit must be (low, high) with 0 <= low <= high, not {(low, high)}")


def _expect_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, not {_shape(tensor)}")


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
