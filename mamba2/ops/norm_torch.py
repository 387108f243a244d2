"""Both norms in plain torch, in float32 (float64 for float64 input): a simple form, and a fast one in blocks of rows
that stay in cache.

Only the inputs are kept for the backward. With û = u / rms(u), v = dy · weight:

    du = (v - û mean(v û)) / rms(u)        dweight = Σ_rows dy û
"""

import torch
import torch.nn.functional as F

from mamba2.ops.fusion import block_elements, fusable, is_fused
from mamba2.ops.gradient import register_gradient, unwatched


def add_rms_norm_reference(
    x: torch.Tensor,  # (..., d)
    residual: torch.Tensor | None,  # (..., d)
    weight: torch.Tensor,  # (d,)
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mamba2.ops.add_rms_norm`."""
    residual = x if residual is None else residual + x.to(residual.dtype)
    wide = residual.to(torch.promote_types(residual.dtype, torch.float32))
    return (_rms_normalise(wide, eps) * weight.to(wide.dtype)).to(dtype), residual


def gated_rms_norm_reference(
    x: torch.Tensor,  # (..., d)
    z: torch.Tensor,  # (..., d)
    weight: torch.Tensor,  # (d,)
    eps: float,
    ngroups: int,
) -> torch.Tensor:
    """See `mamba2.ops.gated_rms_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    gate = F.silu(z.to(wide))
    u = (x.to(wide) * gate).unflatten(-1, (ngroups, -1))
    return (_rms_normalise(u, eps).flatten(-2) * weight.to(wide)).to(x.dtype)


def _rms_normalise(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def add_rms_norm_blocked(
    x: torch.Tensor,  # (..., d)
    residual: torch.Tensor | None,  # (..., d)
    weight: torch.Tensor,  # (d,)
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mamba2.ops.add_rms_norm`."""
    if torch.compiler.is_compiling():
        # The compiler fuses the readable form by itself.
        return add_rms_norm_reference(x, residual, weight, eps, dtype)
    stream = x if residual is None else residual + x.to(residual.dtype)
    return _norm(stream, weight, eps, dtype), stream


def gated_rms_norm_blocked(
    x: torch.Tensor,  # (..., d)
    z: torch.Tensor,  # (..., d)
    weight: torch.Tensor,  # (d,)
    eps: float,
    ngroups: int,
) -> torch.Tensor:
    """See `mamba2.ops.gated_rms_norm`."""
    if torch.compiler.is_compiling():
        return gated_rms_norm_reference(x, z, weight, eps, ngroups)
    return _gated(x, z, weight, eps, ngroups)


def _blocks(rows: torch.Tensor) -> list[slice]:
    """Blocks of rows (t, d)."""
    size = max(1, block_elements(rows.device) * (8 if is_fused() else 1) // rows.shape[1])
    return [slice(start, start + size) for start in range(0, rows.shape[0], size)]


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _inverse_rms(u: torch.Tensor, eps: float) -> torch.Tensor:
    """(..., d) -> (..., 1)"""
    return u.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()


def _norm_backward(
    dy: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of u (t, g, d) and of weight (g, d)."""
    inverse = _inverse_rms(u, eps)  # (t, g, 1)
    unit = u * inverse
    dweight = (dy * unit).sum(dim=0)
    v = dy * weight
    mean = (v * unit).mean(dim=-1, keepdim=True)
    return v.sub_(unit.mul_(mean)).mul_(inverse), dweight


@torch.library.custom_op("mamba2::rms_norm_blocked", mutates_args=())
def norm_op(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """weight · x / rms(x), (..., d) in `dtype`."""
    y = x.new_empty(x.shape, dtype=dtype)
    rows, results, scale = x.reshape(-1, x.shape[-1]), y.view(-1, x.shape[-1]), weight.to(_wide(x))
    for block in _blocks(rows):
        u = rows[block].to(scale.dtype)
        results[block] = (u * _inverse_rms(u, eps)).mul_(scale)
    return y


@norm_op.register_fake
def _(x, weight, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("mamba2::rms_norm_blocked_backward", mutates_args=())
def norm_backward_op(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dweight = x.new_empty(x.shape), torch.zeros_like(weight, dtype=_wide(x))
    d, scale = x.shape[-1], weight.to(dweight.dtype)
    rows, drows, results = x.reshape(-1, d), dy.reshape(-1, d), dx.view(-1, d)
    for block in _blocks(rows):
        du, part = _norm_backward(
            drows[block].to(scale.dtype)[:, None], rows[block].to(scale.dtype)[:, None], scale, eps
        )
        results[block] = du[:, 0]
        dweight += part[0]
    return dx, dweight.to(weight.dtype)


@norm_backward_op.register_fake
def _(dy, x, weight, eps):
    return x.new_empty(x.shape), torch.empty_like(weight)


def _norm_setup(ctx, inputs, output):
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _norm_vjp(ctx, dy):
    return *_norm_gradients(dy, *ctx.saved_tensors, ctx.eps), None, None


_norm = register_gradient(norm_op, _norm_vjp, _norm_setup)
_norm_gradients = unwatched(norm_backward_op)


@fusable
def _gate_and_norm(y: torch.Tensor, x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """Write `y` (t, d) from x and z (t, d) and weight (g, d / g)."""
    u = F.silu(z.to(weight.dtype)).mul_(x).unflatten(1, weight.shape)
    y.copy_(u.mul_(_inverse_rms(u, eps)).mul_(weight).flatten(1))


@fusable
def _gated_rows_gradients(
    dx: torch.Tensor,  # (t, d), written
    dz: torch.Tensor,  # (t, d), written
    dy: torch.Tensor,  # (t, d)
    x: torch.Tensor,  # (t, d)
    z: torch.Tensor,  # (t, d)
    weight: torch.Tensor,  # (g, d / g)
    eps: float,
) -> torch.Tensor:
    """The rows' share of the gradient of weight, (g, d / g)."""
    x, z, dy = (tensor.to(weight.dtype) for tensor in (x, z, dy))
    gate = F.silu(z)
    u = (x * gate).unflatten(1, weight.shape)
    du, dweight = _norm_backward(dy.unflatten(1, weight.shape), u, weight, eps)
    du = du.flatten(1)
    dx.copy_(gate.mul_(du))
    dz.copy_(torch.ops.aten.silu_backward(du.mul_(x), z))
    return dweight


@torch.library.custom_op("mamba2::gated_rms_norm_blocked", mutates_args=())
def gated_op(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, ngroups: int) -> torch.Tensor:
    """weight · u / rms(u) per group, u = x · silu(z), (..., d) in x's dtype."""
    y = x.new_empty(x.shape)
    d, scale = x.shape[-1], weight.to(_wide(x)).view(ngroups, -1)
    rows, gates, results = x.reshape(-1, d), z.reshape(-1, d), y.view(-1, d)
    for block in _blocks(rows):
        _gate_and_norm(results[block], rows[block], gates[block], scale, eps)
    return y


@gated_op.register_fake
def _(x, z, weight, eps, ngroups):
    return x.new_empty(x.shape)


@torch.library.custom_op("mamba2::gated_rms_norm_blocked_backward", mutates_args=())
def gated_backward_op(
    dy: torch.Tensor, x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, ngroups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, dz = x.new_empty(x.shape), z.new_empty(z.shape)
    d, scale = x.shape[-1], weight.to(_wide(x)).view(ngroups, -1)
    dweight = torch.zeros_like(scale)
    rows, gates, drows = (t.reshape(-1, d) for t in (x, z, dy))
    for block in _blocks(rows):
        results = dx.view(-1, d)[block], dz.view(-1, d)[block]
        dweight += _gated_rows_gradients(*results, drows[block], rows[block], gates[block], scale, eps)
    return dx, dz, dweight.flatten().to(weight.dtype)


@gated_backward_op.register_fake
def _(dy, x, z, weight, eps, ngroups):
    return x.new_empty(x.shape), z.new_empty(z.shape), torch.empty_like(weight)


def _gated_setup(ctx, inputs, output):
    *tensors, ctx.eps, ctx.ngroups = inputs
    ctx.save_for_backward(*tensors)


def _gated_backward(ctx, dy):
    return *_gated_gradients(dy, *ctx.saved_tensors, ctx.eps, ctx.ngroups), None, None


_gated = register_gradient(gated_op, _gated_backward, _gated_setup)
_gated_gradients = unwatched(gated_backward_op)
