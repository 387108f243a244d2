"""SSD in plain torch for speed: the mathematics of `chunked.py`, a few chunks at a time, with its own backward.

Intermediates of a block of chunks stay in the CPU's cache, and the (q, q) ones are recomputed by the backward. Only the
inputs and the state before each block are kept for it.

With X, Y (q, p) of one chunk and head, S (p, n) the state before it and S' after it, cs the inclusive cumulative sum of
dt A, L_ij = exp(cs_i - cs_j) for j <= i, e_i = exp(cs_i), w_j = exp(cs_last - cs_j), α = exp(cs_last), G = C Bᵀ:

    Y  = (G∘L) (dt X) + e∘(C Sᵀ) + D∘X         S' = α S + (w∘dt X)ᵀ B

    dS = α dS' + (e∘dY)ᵀ C                     dM = dY (dt X)ᵀ,    dG = Σ_heads dM∘L
    d(dt X) = (G∘L)ᵀ dY + w∘(B dS'ᵀ)           dC = dG B + Σ_heads (e∘dY) S,    dB = dGᵀ C + Σ_heads (w∘dt X) dS'
    d cs_i = Σ_j P_ij - Σ_j P_ji + dY_i·(e∘C Sᵀ)_i - u_i + [i = last] (Σ_j u_j + α <dS', S>)
             with P = dM∘L∘G and u = w (dt X · B dS'ᵀ)

Row and column sums are taken of the same P, so that what must cancel does, also for 16-bit input. The backward of the
cumulative sum is done here; step activation, A, and the gate z are left to autograd.

Across a document boundary e, w, α and L are 0; for L, which could be infinite there, -inf is added before the exp.
"""

import math

import torch
import torch.nn.functional as F

from mamba2.ops.fusion import block_elements, fusable, is_fused
from mamba2.ops.gradient import register_gradient
from mamba2.ops.ssd.chunked import _document_number, _pad
from mamba2.ops.ssd.reference import SSDInputs, activate_dt, skip_and_gate


def ssd_blocked(inputs: SSDInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `mamba2.ops.ssd`; chunks are `chunk_size` long or shorter. Returns y, and the last state if asked for."""
    x, B, D, initial = inputs.x, inputs.B, inputs.D, inputs.initial_states
    wide = torch.promote_types(x.dtype, torch.float32)
    p, n = x.shape[-1], B.shape[-1]
    dt = activate_dt(inputs.dt, inputs.dt_bias, inputs.dt_softplus, inputs.dt_limit, wide)  # (b, l, h)
    if D is not None:
        D = (D if D.dim() == 2 else D[:, None].expand(-1, p)).to(wide)  # (h, p)
    if initial is not None:
        initial = initial.to(wide)
    q = min(inputs.chunk_size, best_chunk(p, n), x.shape[1])
    y, final, _ = forward_op(x, dt, dt * inputs.A.to(wide), B, inputs.C, D, initial, inputs.seq_idx, q)
    # In 16 bits y has been rounded before the gate: one rounding more than in the chunked form.
    if inputs.z is not None:
        y = skip_and_gate(y.to(wide), x, None, inputs.z).to(x.dtype)
    return y, final if inputs.return_final_states else None


def best_chunk(headdim: int, d_state: int) -> int:
    """Chunk length, a power of two near √(p n): there scores (q h) plus states (h p n / q) per token are fewest."""
    return 1 << max(4, round(math.log2(headdim * d_state) / 2))


def count_blocks(x: torch.Tensor, q: int) -> int:
    """Number of blocks in which the chunks of x (b, l, h, p) are processed."""
    b, l, h, _ = x.shape
    # When fused, (q, q) intermediates are not stored in float32.
    elements = block_elements(x.device) * (4 if is_fused() else 1)
    chunks, size = -(-l // q), max(1, elements // (b * h * q * q))
    size = -(-chunks // -(-chunks // size))
    return -(-chunks // size)


class Plan:
    """Sizes, the inputs padded to whole chunks, and the loop over blocks of chunks."""

    def __init__(self, x, dt, a, B, C, seq_idx, q, count: int):
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
        size = -(-self.c // count)  # nearly equal: each size is compiled separately
        self.blocks = [slice(i, min(i + size, self.c)) for i in range(0, self.c, size)]

    def pad(self, tensor: torch.Tensor) -> torch.Tensor:
        return _pad(tensor, self.padding) if self.padding else tensor

    def tokens(self, tensor: torch.Tensor, block: slice) -> torch.Tensor:
        """The block's part of (b, l, ...) as a view (b, chunks, q, ...)."""
        return tensor[:, block.start * self.q : block.stop * self.q].unflatten(1, (-1, self.q))

    def by_group(self, tensor: torch.Tensor, block: slice) -> torch.Tensor:
        """(b, l, g, n) -> (m, q, n), m = b · chunks · g matrices"""
        return self.tokens(tensor, block).transpose(2, 3).reshape(-1, self.q, tensor.shape[-1])

    def store_group(self, result: torch.Tensor, matrices: torch.Tensor, block: slice) -> None:
        """Write (m, q, n) into the block's part of (b, l, g, n)."""
        self.tokens(result, block).copy_(matrices.view(self.b, -1, self.g, self.q, self.n).transpose(2, 3))

    def states(self, matrices: torch.Tensor) -> torch.Tensor:
        """(m, r p, n) -> (b, chunks, h, p, n)"""
        return matrices.view(self.b, -1, self.h, self.p, self.n)

    def decays(self, block: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """cs, e and w of the block, (b, chunks, h, q); its documents (b, chunks, q), or None."""
        cs = self.tokens(self.a, block).transpose(2, 3).cumsum(dim=-1)
        e, w = torch.exp(cs), torch.exp(cs[..., -1:] - cs)
        if self.document is None:
            return cs, e, w, None
        document = self.document[:, block]
        e = e * (document == self.before[:, block, None])[:, :, None]
        w = w * (document == document[..., -1:])[:, :, None]
        return cs, e, w, document


# Between the matrix products. m = b · chunks · g matrices, r heads per group; x and y are (b, chunks, q, h, p).


def _by_head(tensor: torch.Tensor, r: int, dtype: torch.dtype) -> torch.Tensor:
    """(b, chunks, q, h, p) -> (m, r, q, p), contiguous, in `dtype`"""
    heads = tensor.unflatten(3, (-1, r)).permute(0, 1, 3, 4, 2, 5)
    copy = torch.empty(heads.shape, dtype=dtype, device=tensor.device).copy_(heads)
    return copy.view(-1, *copy.shape[3:])


def _packed(heads: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(m, r, q, p) -> (m, q, r p), contiguous, in `dtype`"""
    m, r, q, p = heads.shape
    return torch.empty(m, q, r, p, dtype=dtype, device=heads.device).copy_(heads.transpose(1, 2)).view(m, q, r * p)


def _unpacked(matrix: torch.Tensor, r: int, dtype: torch.dtype) -> torch.Tensor:
    """(m, q, r p) -> (m, r, q, p), contiguous, in `dtype`"""
    heads = matrix.unflatten(2, (r, -1)).transpose(1, 2)
    return torch.empty(heads.shape, dtype=dtype, device=matrix.device).copy_(heads)


def _store(result: torch.Tensor, heads: torch.Tensor) -> None:
    """Write (m, r, q, p) into a view (b, chunks, q, h, p), or (m, r, q) into (b, chunks, q, h)."""
    r = heads.shape[1]
    heads = heads.view(*result.shape[:2], -1, *heads.shape[1:])  # (b, chunks, g, r, q, ...)
    result.unflatten(3, (-1, r)).copy_(heads.movedim(4, 2))


def _per_head(steps: torch.Tensor, r: int) -> torch.Tensor:
    """(b, chunks, h, q) -> (m, r, q, 1)"""
    return steps.reshape(-1, r, steps.shape[3], 1)


def _decay(cs: torch.Tensor, document: torch.Tensor | None, r: int) -> torch.Tensor:
    """L, (m, r, q, q)"""
    q = cs.shape[3]
    L = cs[..., :, None] - cs[..., None, :]  # (b, chunks, h, q, q)
    if document is None:
        # Above the diagonal exp may be infinite; `tril_` writes zeros there.
        return L.exp_().tril_().view(-1, r, q, q)
    visible = (document[..., :, None] == document[..., None, :]).tril()  # (b, chunks, q, q)
    hidden = torch.zeros_like(visible, dtype=cs.dtype).masked_fill_(~visible, -math.inf)
    return L.add_(hidden[:, :, None]).exp_().view(-1, r, q, q)


@fusable
def _writes(x: torch.Tensor, dt: torch.Tensor, w: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """dt X (m r, q, p) and w∘dt X (m, q, r p), narrow."""
    xdt = _by_head(x, r, dt.dtype).mul_(_per_head(dt.transpose(2, 3), r))  # (m, r, q, p)
    return xdt.to(x.dtype).flatten(0, 1), _packed(xdt * _per_head(w, r), x.dtype)


@fusable
def _pass(state: torch.Tensor, written: torch.Tensor, alpha: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Write the state before each chunk to `states` (b, chunks, h, p, n); return that after the last, (b, h, p, n)."""
    for i in range(states.shape[1]):
        states[:, i] = state
        state = torch.addcmul(written[:, i].to(state.dtype), state, alpha[:, i, :, None, None])
    return state


@fusable
def _scores(cs: torch.Tensor, document: torch.Tensor | None, G: torch.Tensor, r: int) -> torch.Tensor:
    """G∘L (m r, q, q), narrow."""
    return _decay(cs, document, r).mul_(G[:, None]).to(G.dtype).flatten(0, 1)


@fusable
def _outputs(
    y: torch.Tensor,
    inside: torch.Tensor,
    across: torch.Tensor,
    e: torch.Tensor,
    x: torch.Tensor,
    D: torch.Tensor | None,
    r: int,
) -> None:
    """Write Y to `y` from (G∘L)(dt X), `inside` (m r, q, p), and C Sᵀ, `across` (m, q, r p)."""
    result = _unpacked(across, r, e.dtype).mul_(_per_head(e, r))  # (m, r, q, p)
    result += inside.view(result.shape)
    if D is not None:
        skip = _by_head(x, r, e.dtype).view(-1, *D.shape[:1], *result.shape[2:])  # (b chunks, h, q, p)
        result.view(skip.shape).addcmul_(skip, D[:, None])
    _store(y, result)


@fusable
def _reads(dy: torch.Tensor, e: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """dY (m r, q, p) and e∘dY (m, q, r p), narrow."""
    dyh = _by_head(dy, r, e.dtype)
    return dyh.to(dy.dtype).flatten(0, 1), _packed(dyh * _per_head(e, r), dy.dtype)


@fusable
def _pass_back(
    dstate: torch.Tensor, read: torch.Tensor, alpha: torch.Tensor, states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dS before the first chunk; dS' of each chunk, (b, chunks, h, p, n), narrow; α <dS', S>, (b, chunks, h)."""
    after, products = [], []
    for i in reversed(range(states.shape[1])):
        after.append(dstate.to(states.dtype))
        products.append((dstate * states[:, i]).sum(dim=(-2, -1)))
        dstate = torch.addcmul(read[:, i].to(dstate.dtype), dstate, alpha[:, i, :, None, None])
    return dstate, torch.stack(after[::-1], dim=1), torch.stack(products[::-1], dim=1).mul_(alpha)


@fusable
def _score_gradients(
    dM: torch.Tensor, cs: torch.Tensor, document: torch.Tensor | None, G: torch.Tensor, r: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """G∘L (m r, q, q) and dG (m, q, q), narrow; P's row sums less its column sums (m, r, q); from dM (m r, q, q)."""
    L = _decay(cs, document, r)
    weighted = dM.to(L.dtype).view(L.shape).mul_(L)  # dM∘L
    dG = weighted.sum(dim=1).to(G.dtype)
    weighted *= G[:, None]  # P
    dcs = weighted.sum(dim=-1).sub_(weighted.sum(dim=-2))
    return L.mul_(G[:, None]).to(G.dtype).flatten(0, 1), dG, dcs


@fusable
def _input_gradients(
    dx: torch.Tensor,
    ddt: torch.Tensor,
    inside: torch.Tensor,
    written: torch.Tensor,
    across: torch.Tensor,
    x: torch.Tensor,
    dy: torch.Tensor,
    dt: torch.Tensor,
    e: torch.Tensor,
    w: torch.Tensor,
    D: torch.Tensor | None,
    r: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Write gradients of x and dt to `dx`, `ddt`, from (G∘L)ᵀ dY, `inside` (m r, q, p), B dS'ᵀ, `written`, and C Sᵀ,
    `across` (m, q, r p). Returns u and dY·(e∘C Sᵀ), (m, r, q), and dD (h, p)."""
    wide = dt.dtype
    xh, dyh = _by_head(x, r, wide), _by_head(dy, r, wide)  # (m, r, q, p)
    steps = _per_head(dt.transpose(2, 3), r)
    written = _unpacked(written, r, wide).mul_(_per_head(w, r))  # w∘(B dS'ᵀ)
    dxdt = written + inside.view(written.shape)
    u = written.mul_(xh).sum(dim=-1).mul_(steps[..., 0])
    inter = _unpacked(across, r, wide).mul_(dyh).sum(dim=-1).mul_(_per_head(e, r)[..., 0])
    _store(ddt, (dxdt * xh).sum(dim=-1))
    dxdt *= steps
    dD = None
    if D is not None:
        shape = (-1, *D.shape[:1], *dxdt.shape[2:])  # (b chunks, h, q, p)
        dxdt.view(shape).addcmul_(dyh.view(shape), D[:, None])
        dD = dyh.mul_(xh).view(shape).sum(dim=(0, 2))
    _store(dx, dxdt)
    return u, inter, dD


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
    """y (b, l, h, p), the last state (b, h, p, n) wide, the state before each block (b, blocks, h, p, n) narrow."""
    plan = Plan(x, dt, a, B, C, seq_idx, q, count_blocks(x, q))
    b, h, p, n, r = plan.b, plan.h, plan.p, plan.n, plan.r
    y = x.new_empty(b, plan.c * q, h, p)
    starts = x.new_empty(b, len(plan.blocks), h, p, n)
    state = dt.new_zeros(b, h, p, n) if initial is None else initial.clone()
    for i, block in enumerate(plan.blocks):
        starts[:, i] = state
        xt = plan.tokens(plan.x, block)
        Bg, Cg = plan.by_group(plan.B, block), plan.by_group(plan.C, block)  # (m, q, n)
        cs, e, w, document = plan.decays(block)
        xdt, x_out = _writes(xt, plan.tokens(plan.dt, block), w, r)
        written = plan.states(torch.bmm(x_out.transpose(1, 2), Bg))
        states = torch.empty_like(written)
        state = _pass(state, written, e[..., -1], states)
        before = states.view(-1, r * p, n)  # (m, r p, n)
        G = torch.bmm(Cg, Bg.transpose(1, 2))  # (m, q, q)
        inside = torch.bmm(_scores(cs, document, G, r), xdt)
        across = torch.bmm(Cg, before.transpose(1, 2))
        _outputs(plan.tokens(y, block), inside, across, e, xt, D, r)
    return y[:, : plan.l].contiguous(), state, starts


@forward_op.register_fake
def _(x, dt, a, B, C, D, initial, seq_idx, q):
    b, _, h, p = x.shape
    n = B.shape[-1]
    return x.new_empty(x.shape), dt.new_empty(b, h, p, n), x.new_empty(b, count_blocks(x, q), h, p, n)


@torch.library.custom_op("mamba2::ssd_blocked_backward", mutates_args=())
def backward_op(
    dy: torch.Tensor,  # (b, l, h, p)
    dfinal: torch.Tensor | None,  # (b, h, p, n) wide
    starts: torch.Tensor,  # (b, blocks, h, p, n)
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
    plan = Plan(x, dt, a, B, C, seq_idx, q, starts.shape[1])
    b, h, p, n, r, narrow, wide = plan.b, plan.h, plan.p, plan.n, plan.r, plan.narrow, plan.wide
    dy = plan.pad(dy)
    dx, dB, dC = (torch.empty(t.shape, dtype=narrow, device=t.device) for t in (plan.x, plan.B, plan.C))
    ddt, da = (torch.empty(t.shape, dtype=wide, device=t.device) for t in (plan.dt, plan.a))
    dD = dt.new_zeros((h, p) if D is not None else 0)
    dstate = dt.new_zeros(b, h, p, n) if dfinal is None else dfinal.to(wide).clone()
    for i, block in reversed(list(enumerate(plan.blocks))):
        xt, dyt, steps = (plan.tokens(t, block) for t in (plan.x, dy, plan.dt))
        Bg, Cg = plan.by_group(plan.B, block), plan.by_group(plan.C, block)  # (m, q, n)
        cs, e, w, document = plan.decays(block)
        xdt, x_out = _writes(xt, steps, w, r)
        dyh, dy_in = _reads(dyt, e, r)
        written = plan.states(torch.bmm(x_out.transpose(1, 2), Bg))
        states = torch.empty_like(written)
        _pass(starts[:, i].to(wide), written, e[..., -1], states)
        before = states.view(-1, r * p, n)  # (m, r p, n)

        # Between chunks, from the last to the first.
        read = plan.states(torch.bmm(dy_in.transpose(1, 2), Cg))
        dstate, dafter, dchunk = _pass_back(dstate, read, e[..., -1], states)
        dafter = dafter.view(-1, r * p, n)

        # Inside a chunk.
        G = torch.bmm(Cg, Bg.transpose(1, 2))  # (m, q, q)
        dM = torch.bmm(dyh, xdt.transpose(1, 2))
        scores, dG, dcs = _score_gradients(dM, cs, document, G, r)

        inside = torch.bmm(scores.transpose(1, 2), dyh)
        written = torch.bmm(Bg, dafter.transpose(1, 2))
        across = torch.bmm(Cg, before.transpose(1, 2))
        dxt, ddtt = plan.tokens(dx, block), plan.tokens(ddt, block)
        u, inter, part = _input_gradients(dxt, ddtt, inside, written, across, xt, dyt, steps, e, w, D, r)
        if D is not None:
            dD += part
        dcs += inter.sub_(u)
        dcs[..., -1] += u.sum(dim=-1) + dchunk.view(-1, r)
        _store(plan.tokens(da, block), dcs.flip(-1).cumsum(-1).flip(-1))
        plan.store_group(dC, torch.bmm(dG, Bg).baddbmm_(dy_in, before), block)
        plan.store_group(dB, torch.bmm(dG.transpose(1, 2), Cg).baddbmm_(x_out, dafter), block)
    l = plan.l
    return (*(grad[:, :l].contiguous() for grad in (dx, ddt, da, dB, dC)), dD, dstate)


@backward_op.register_fake
def _(dy, dfinal, starts, x, dt, a, B, C, D, seq_idx, q):
    b, _, h, p = x.shape
    grads = (t.new_empty(t.shape) for t in (x, dt, a, B, C))
    return (*grads, dt.new_empty((h, p) if D is not None else 0), dt.new_empty(b, h, p, B.shape[-1]))


def _setup_context(ctx, inputs, output):
    x, dt, a, B, C, D, initial, seq_idx, ctx.q = inputs
    ctx.has_initial = initial is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], x, dt, a, B, C, D, seq_idx)


def _backward(ctx, dy, dfinal, _):
    starts, x, dt, a, B, C, D, seq_idx = ctx.saved_tensors
    if dy is None:
        dy = x.new_zeros(()).expand(x.shape)
    *grads, dD, dinitial = backward_op(dy, dfinal, starts, x, dt, a, B, C, D, seq_idx, ctx.q)
    # seq_idx and q have none.
    return *grads, None if D is None else dD, dinitial if ctx.has_initial else None, None, None


register_gradient(forward_op, _backward, _setup_context)
