"""SSD in plain torch for speed: the mathematics of `chunked.py`, a few chunks at a time, with its own backward.

Intermediates of a block of chunks stay in the processor's cache and nothing quadratic in the chunk outlives its block:
the backward computes it again. Kept for the backward are the inputs and the state before each chunk.

With X, Y (q, p) of one chunk and head, S (p, n) the state before it and S' after it, cs the inclusive cumulative sum of
dt A, L_ij = exp(cs_i - cs_j) for j <= i, e_i = exp(cs_i), w_j = exp(cs_last - cs_j), α = exp(cs_last), G = C Bᵀ:

    Y  = (G∘L) (dt X) + e∘(C Sᵀ) + D∘X         S' = α S + (w∘dt X)ᵀ B

    dS = α dS' + (e∘dY)ᵀ C                     dM = dY (dt X)ᵀ,    dG = Σ_heads dM∘L
    d(dt X) = (G∘L)ᵀ dY + w∘(B dS'ᵀ)           dC = dG B + Σ_heads (e∘dY) S,    dB = dGᵀ C + Σ_heads (w∘dt X) dS'
    d cs_i = Σ_j P_ij - Σ_j P_ji + dY_i·(e∘C Sᵀ)_i - u_i + [i = last] (Σ_j u_j + α <dS', S>)
             with P = dM∘L∘G and u = w (dt X · B dS'ᵀ)

Row and column sums of P come from one and the same P, so that what must cancel does, also in 16 bits. The cumulative
sum inside a chunk is undone here; step activation, A, and the gate z are left to autograd.

A document boundary is a decay of zero: e, w, α and L are set to 0, never multiplied by it where they could be infinite.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mamba2.ops.device import block_elements
from mamba2.ops.ssd.chunked import _document_number, _pad
from mamba2.ops.ssd.reference import activate_dt


def ssd_blocked(
    x: torch.Tensor,  # (b, l, h, p)
    dt: torch.Tensor,  # (b, l, h)
    A: torch.Tensor,  # (h,)
    B: torch.Tensor,  # (b, l, g, n)
    C: torch.Tensor,  # (b, l, g, n)
    chunk_size: int,
    D: torch.Tensor | None,  # (h,) or (h, p)
    z: torch.Tensor | None,  # (b, l, h, p)
    dt_bias: torch.Tensor | None,  # (h,)
    initial_states: torch.Tensor | None,  # (b, h, p, n)
    seq_idx: torch.Tensor | None,  # (b, l)
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    return_final_states: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `mamba2.ops.ssd`; chunks are `chunk_size` long or shorter. Returns y, and the last state if asked for."""
    wide = torch.promote_types(x.dtype, torch.float32)
    p, n = x.shape[-1], B.shape[-1]
    dt = activate_dt(dt, dt_bias, dt_softplus, dt_limit, wide)  # (b, l, h)
    if D is not None:
        D = (D if D.dim() == 2 else D[:, None].expand(-1, p)).to(wide)  # (h, p)
    if initial_states is not None:
        initial_states = initial_states.to(wide)
    # The gate belongs to the wide result: in 16 bits y is rounded once more before it than in the chunked form.
    q = min(chunk_size, best_chunk(p, n), x.shape[1])
    y, final, _ = forward_op(x, dt, dt * A.to(wide), B, C, D, initial_states, seq_idx, q)
    if z is not None:
        y = (y.to(wide) * F.silu(z.to(wide))).to(x.dtype)
    return y, final if return_final_states else None


def best_chunk(headdim: int, d_state: int) -> int:
    """Chunk length with the least to move: scores q h per token, states h p n / q; their balance as a power of two."""
    return 1 << max(4, round(math.log2(headdim * d_state) / 2))


class Block(NamedTuple):
    """What forward and backward both need of some chunks; m = b · chunks · g matrices, r heads per group."""

    x: torch.Tensor  # (m, r, q, p) wide
    xdt: torch.Tensor  # (m, r, q, p) wide, x · dt
    dt: torch.Tensor  # (m, r, q, 1)
    B: torch.Tensor  # (m, q, n)
    C: torch.Tensor  # (m, q, n)
    decay: torch.Tensor  # (m, r, q, q), L
    decay_in: torch.Tensor  # (m, r, q, 1), e
    decay_out: torch.Tensor  # (m, r, q, 1), w
    decay_chunk: torch.Tensor  # (b, chunks, h, 1, 1), α
    G: torch.Tensor  # (m, 1, q, q) wide


class Plan:
    """Sizes, the inputs padded to whole chunks, and the loop over blocks."""

    def __init__(self, x, dt, a, B, C, seq_idx, q):
        self.b, self.l, self.h, self.p = x.shape
        self.g, self.n = B.shape[2:]
        self.r, self.q = self.h // self.g, q
        self.c = -(-self.l // q)
        self.narrow, self.wide = x.dtype, dt.dtype
        self.padding = self.c * q - self.l
        # Past the end dt is 0: the state neither decays nor is written.
        self.x, self.dt, self.a, self.B, self.C = (self.pad(t) for t in (x, dt, a, B, C))
        self.document = self.before = None
        if seq_idx is not None:
            self.document = _document_number(seq_idx, self.padding).view(self.b, self.c, q)
            self.before = F.pad(self.document[:, :-1, -1], (1, 0))  # (b, c), of the token before the chunk
        size = max(1, block_elements(x.device) // (self.b * self.h * q * q))
        self.blocks = [slice(i, min(i + size, self.c)) for i in range(0, self.c, size)]

    def pad(self, tensor: torch.Tensor) -> torch.Tensor:
        return _pad(tensor, self.padding) if self.padding else tensor

    def tokens(self, tensor: torch.Tensor, block: slice) -> torch.Tensor:
        """The block's tokens, (b, chunks, q, ...)."""
        return tensor[:, block.start * self.q : block.stop * self.q].unflatten(1, (-1, self.q))

    def by_group(self, tensor: torch.Tensor, block: slice) -> torch.Tensor:
        """(b, l, g, n) -> (m, q, n)"""
        return self.tokens(tensor, block).transpose(2, 3).reshape(-1, self.q, tensor.shape[-1])

    def by_head(self, tensor: torch.Tensor, block: slice, dtype: torch.dtype) -> torch.Tensor:
        """(b, l, h, p) -> (m, r, q, p) in `dtype`, of its own"""
        heads = self.tokens(tensor, block).unflatten(3, (self.g, self.r)).permute(0, 1, 3, 4, 2, 5)
        copy = torch.empty(heads.shape, dtype=dtype, device=tensor.device).copy_(heads)
        return copy.view(-1, self.r, self.q, self.p)

    def per_head(self, tensor: torch.Tensor, block: slice) -> torch.Tensor:
        """(b, l, h) -> (m, r, q)"""
        steps = self.tokens(tensor, block).unflatten(3, (self.g, self.r)).permute(0, 1, 3, 4, 2)
        return steps.reshape(-1, self.r, self.q)

    def packed(self, heads: torch.Tensor) -> torch.Tensor:
        """(m, r, q, p) -> (m, q, r p) in the products' dtype"""
        m, r, q, p = heads.shape
        result = torch.empty(m, q, r, p, dtype=self.narrow, device=heads.device)
        return result.copy_(heads.transpose(1, 2)).view(m, q, r * p)

    def unpacked(self, matrix: torch.Tensor) -> torch.Tensor:
        """(m, q, r p) -> (m, r, q, p), wide, of its own"""
        heads = matrix.view(-1, self.q, self.r, self.p).transpose(1, 2)
        return torch.empty(heads.shape, dtype=self.wide, device=matrix.device).copy_(heads)

    def store(self, result: torch.Tensor, heads: torch.Tensor, block: slice) -> None:
        """Write (m, r, q, p) into the block's part of (b, l, h, p)."""
        heads = heads.view(self.b, -1, self.g, self.r, self.q, self.p)
        self.tokens(result, block).unflatten(3, (self.g, self.r)).copy_(heads.permute(0, 1, 4, 2, 3, 5))

    def store_group(self, result: torch.Tensor, matrices: torch.Tensor, block: slice) -> None:
        """Write (m, q, n) into the block's part of (b, l, g, n)."""
        self.tokens(result, block).copy_(matrices.view(self.b, -1, self.g, self.q, self.n).transpose(2, 3))

    def store_steps(self, result: torch.Tensor, steps: torch.Tensor, block: slice) -> None:
        """Write (m, r, q) into the block's part of (b, l, h)."""
        steps = steps.view(self.b, -1, self.g, self.r, self.q).permute(0, 1, 4, 2, 3)
        self.tokens(result, block).unflatten(3, (self.g, self.r)).copy_(steps)

    def states(self, matrices: torch.Tensor) -> torch.Tensor:
        """(m, r p, n) -> (b, chunks, h, p, n)"""
        return matrices.view(self.b, -1, self.h, self.p, self.n)

    def load(self, block: slice) -> Block:
        b, g, r, q = self.b, self.g, self.r, self.q
        x = self.by_head(self.x, block, self.wide)
        dt = self.per_head(self.dt, block).unsqueeze(-1)  # (m, r, q, 1)
        cs = torch.cumsum(self.per_head(self.a, block), dim=-1)  # (m, r, q)
        B, C = self.by_group(self.B, block), self.by_group(self.C, block)
        decay_in = torch.exp(cs)
        decay_out = torch.exp(cs[..., -1:] - cs)
        decay = cs[..., :, None] - cs[..., None, :]  # (m, r, q, q)
        if self.document is None:
            # Above the diagonal exp may be infinite; `tril_` writes zeros there.
            decay.exp_().tril_()
        else:
            document = self.document[:, block]  # (b, chunks, q)
            visible = (document[..., :, None] == document[..., None, :]).tril()  # (b, chunks, q, q)
            hidden = torch.zeros_like(visible, dtype=self.wide).masked_fill_(~visible, -math.inf)
            decay.view(b, -1, g, r, q, q).add_(hidden[:, :, None, None])
            decay.exp_()
            continues = document == self.before[:, block, None]  # (b, chunks, q)
            survives = document == document[..., -1:]
            decay_in = decay_in.view(b, -1, g, r, q) * continues[:, :, None, None]
            decay_out = decay_out.view(b, -1, g, r, q) * survives[:, :, None, None]
        decay_in, decay_out = decay_in.view(-1, r, q, 1), decay_out.view(-1, r, q, 1)
        return Block(
            x,
            x * dt,
            dt,
            B,
            C,
            decay,
            decay_in,
            decay_out,
            decay_in[:, :, -1].reshape(b, -1, self.h, 1, 1),
            torch.bmm(C, B.transpose(1, 2)).to(self.wide).unsqueeze(1),
        )


@torch.library.custom_op("mamba2::ssd_blocked_forward", mutates_args=())
def forward_op(
    x: torch.Tensor,  # (b, l, h, p)
    dt: torch.Tensor,  # (b, l, h) wide, activated
    a: torch.Tensor,  # (b, l, h) wide, dt A
    B: torch.Tensor,  # (b, l, g, n)
    C: torch.Tensor,  # (b, l, g, n)
    D: torch.Tensor | None,  # (h, p) wide
    initial: torch.Tensor | None,  # (b, h, p, n) wide
    seq_idx: torch.Tensor | None,  # (b, l)
    q: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y (b, l, h, p), the last state (b, h, p, n) wide, and the state before each chunk (b, c, h, p, n), narrow."""
    plan = Plan(x, dt, a, B, C, seq_idx, q)
    b, h, p, n, r, g = plan.b, plan.h, plan.p, plan.n, plan.r, plan.g
    y = x.new_empty(b, plan.c * q, h, p)
    states = x.new_empty(b, plan.c, h, p, n)
    state = dt.new_zeros(b, h, p, n) if initial is None else initial.clone()
    for block in plan.blocks:
        t = plan.load(block)
        written = plan.states(torch.bmm(plan.packed(t.xdt * t.decay_out).transpose(1, 2), t.B))
        for i, chunk in enumerate(range(block.start, block.stop)):
            states[:, chunk] = state
            state.mul_(t.decay_chunk[:, i]).add_(written[:, i])
        before = states[:, block].reshape(-1, r * p, n)  # (m, r p, n)
        result = plan.unpacked(torch.bmm(t.C, before.transpose(1, 2))).mul_(t.decay_in)  # (m, r, q, p)
        scores = t.decay.mul_(t.G).to(plan.narrow)  # (m, r, q, q)
        result += torch.bmm(scores.flatten(0, 1), t.xdt.to(plan.narrow).flatten(0, 1)).view(result.shape)
        if D is not None:
            result.view(-1, g, r, q, p).addcmul_(t.x.view(-1, g, r, q, p), D.view(g, r, 1, p))
        plan.store(y, result, block)
    return y[:, : plan.l].contiguous(), state, states


@forward_op.register_fake
def _(x, dt, a, B, C, D, initial, seq_idx, q):
    b, l, h, p = x.shape
    n = B.shape[-1]
    return x.new_empty(x.shape), dt.new_empty(b, h, p, n), x.new_empty(b, -(-l // q), h, p, n)


@torch.library.custom_op("mamba2::ssd_blocked_backward", mutates_args=())
def backward_op(
    dy: torch.Tensor,  # (b, l, h, p)
    dfinal: torch.Tensor | None,  # (b, h, p, n) wide
    states: torch.Tensor,  # (b, c, h, p, n)
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    q: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, dt, a, B, C, D (empty without D) and of the state before the first token."""
    plan = Plan(x, dt, a, B, C, seq_idx, q)
    b, h, p, n, r, g, narrow, wide = plan.b, plan.h, plan.p, plan.n, plan.r, plan.g, plan.narrow, plan.wide
    dy = plan.pad(dy)
    dx, dB, dC = (torch.empty(t.shape, dtype=narrow, device=t.device) for t in (plan.x, plan.B, plan.C))
    ddt, da = (torch.empty(t.shape, dtype=wide, device=t.device) for t in (plan.dt, plan.a))
    dD = dt.new_zeros((h, p) if D is not None else 0)
    dstate = dt.new_zeros(b, h, p, n) if dfinal is None else dfinal.to(wide).clone()
    for block in reversed(plan.blocks):
        t = plan.load(block)
        before = states[:, block].reshape(-1, r * p, n)  # (m, r p, n)
        dyh = plan.by_head(dy, block, wide)  # (m, r, q, p)

        # Between chunks, from the last to the first.
        dy_in = plan.packed(dyh * t.decay_in)  # (m, q, r p)
        read = plan.states(torch.bmm(dy_in.transpose(1, 2), t.C))
        dafter = torch.empty_like(states[:, block])  # dS' of each chunk
        dchunk = dt.new_empty(b, block.stop - block.start, h)  # α <dS', S>
        for i in reversed(range(block.stop - block.start)):
            dafter[:, i] = dstate
            dchunk[:, i] = torch.linalg.vecdot(dstate.flatten(2), states[:, block.start + i].to(wide).flatten(2))
            dstate.mul_(t.decay_chunk[:, i]).add_(read[:, i])
        dchunk *= t.decay_chunk[..., 0, 0]
        dafter = dafter.view(-1, r * p, n)

        # Inside a chunk: dM, then what it gives to G and to the decays, then M.
        xdt, dyn = t.xdt.to(narrow).flatten(0, 1), dyh.to(narrow).flatten(0, 1)  # (m r, q, p)
        weighted = torch.bmm(dyn, xdt.transpose(1, 2)).to(wide).view(t.decay.shape).mul_(t.decay)  # dM∘L
        dG = weighted.sum(dim=1).to(narrow)  # (m, q, q)
        weighted *= t.G  # P
        dcs = weighted.sum(dim=-1).sub_(weighted.sum(dim=-2))  # (m, r, q)
        scores = t.decay.mul_(t.G).to(narrow).flatten(0, 1)  # (m r, q, q)
        dxdt = torch.bmm(scores.transpose(1, 2), dyn).to(wide).view(t.x.shape)

        written = plan.unpacked(torch.bmm(t.B, dafter.transpose(1, 2))).mul_(t.decay_out)  # w∘(B dS'ᵀ)
        dxdt += written
        u = written.mul_(t.xdt).sum(dim=-1)  # (m, r, q)
        dcs -= u
        inter = plan.unpacked(torch.bmm(t.C, before.transpose(1, 2))).mul_(dyh).sum(dim=-1)
        dcs += inter.mul_(t.decay_in.squeeze(-1))
        dcs[..., -1] += u.sum(dim=-1) + dchunk.view(-1, r)

        plan.store_group(dC, torch.bmm(dG, t.B).baddbmm_(dy_in, before), block)
        x_out = plan.packed(t.xdt * t.decay_out)  # (m, q, r p)
        plan.store_group(dB, torch.bmm(dG.transpose(1, 2), t.C).baddbmm_(x_out, dafter), block)
        plan.store_steps(da, dcs.flip(-1).cumsum(-1).flip(-1), block)
        plan.store_steps(ddt, (dxdt * t.x).sum(dim=-1), block)
        dxdt *= t.dt
        if D is not None:
            dxdt.view(-1, g, r, q, p).addcmul_(dyh.view(-1, g, r, q, p), D.view(g, r, 1, p))
            dD += (dyh * t.x).sum(dim=2).view(-1, h, p).sum(dim=0)
        plan.store(dx, dxdt, block)
    l = plan.l
    return (*(grad[:, :l].contiguous() for grad in (dx, ddt, da, dB, dC)), dD, dstate)


@backward_op.register_fake
def _(dy, dfinal, states, x, dt, a, B, C, D, seq_idx, q):
    b, _, h, p = x.shape
    grads = (t.new_empty(t.shape) for t in (x, dt, a, B, C))
    return (*grads, dt.new_empty((h, p) if D is not None else 0), dt.new_empty(b, h, p, B.shape[-1]))


def _setup_context(ctx, inputs, output):
    x, dt, a, B, C, D, initial, seq_idx, ctx.q = inputs
    ctx.has_initial = initial is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], x, dt, a, B, C, D, seq_idx)


def _backward(ctx, dy, dfinal, _):
    states, x, dt, a, B, C, D, seq_idx = ctx.saved_tensors
    if dy is None:
        dy = x.new_zeros(()).expand(x.shape)
    *grads, dD, dinitial = backward_op(dy, dfinal, states, x, dt, a, B, C, D, seq_idx, ctx.q)
    # seq_idx and q have none.
    return *grads, None if D is None else dD, dinitial if ctx.has_initial else None, None, None


forward_op.register_autograd(_backward, setup_context=_setup_context)
