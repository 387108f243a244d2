"""SSD backward, what a walk from the end of a span makes: dx, and with it the part of ddt that is not of decays.

Inside a chunk of Q tokens, with `cs` the inclusive cumulative sum of dt A, E_ij = exp(cs_i - cs_j) for j <= i, and R
the gradient of the state after the chunk:

    u_j    = Σ_{i>=j} (C_i·B_j) E_ij dout_i + exp(cs_last - cs_j) Rᵀ B_j
    dx_j   = dt_j u_j + D dout_j        dD = Σ_j dout_j·x_j        u_j·x_j is kept: the part of ddt_j that it is
    v_j    = exp(cs_last - cs_j) dt_j x_j·(Rᵀ B_j)                 kept too: what j gives to decays after its chunk
    R_prev = exp(cs_last) R + Σ_i exp(cs_i) C_i dout_iᵀ

The walks are programs of `triton_gradient`'s launch, whose other programs read the same tokens.

With a gate, one launch before everything: z, dout, y in, dy and dz out, 10 h p bytes per token, 16-bit input.
"""

import triton
import triton.language as tl

from mamba2.ops.ssd.triton_common import (
    add_outer,
    dot,
    dot_rows,
    dot_state,
    load_chunk_decays,
    load_head,
    load_rows,
    load_steps,
    load_tile,
    scaled,
    store_tile,
)
from mamba2.ops.triton_math import silu, silu_slope


@triton.jit
def _gate_kernel(
    dout,  # (b, l, h, p)
    z,  # (b, l, h, p)
    ungated,  # y before the gate, (b, l, h, p), contiguous
    dy,  # out: gradient of y before the gate, (b, l, h, p); this and dz contiguous
    dz,  # out: (b, l, h, p)
    batch_strides,  # of dout, z
    seqlen,
    dout_strides: tl.constexpr,
    z_strides: tl.constexpr,
    h: tl.constexpr,
    p: tl.constexpr,
    Q: tl.constexpr,
    P_TILE: tl.constexpr,
):
    """Grid (chunks, h, b). dy = dout silu(z), dz = dout y silu'(z); the kernels below then know of no gate."""
    start = tl.program_id(0) * Q
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, Q)
    columns = tl.arange(0, P_TILE)
    dout += batch * batch_strides[0] + head * dout_strides[1]
    z += batch * batch_strides[1] + head * z_strides[1]
    gradient = load_head(dout, start, seqlen, columns, dout_strides, p, Q).to(tl.float32)
    gate = load_head(z, start, seqlen, columns, z_strides, p, Q).to(tl.float32)
    here = ((batch * seqlen + start) * h + head) * p
    before = load_tile(ungated + here, rows, seqlen - start, columns, p, h * p, 1).to(tl.float32)
    store_tile(dy + here, rows, seqlen - start, columns, p, h * p, gradient * silu(gate))
    store_tile(dz + here, rows, seqlen - start, columns, p, h * p, gradient * before * silu_slope(gate))


@triton.jit
def walk_span(
    x,  # pointers to the sequence's first token, for the head; likewise all below
    B,
    C,
    skip,  # D of the program's channels, or None
    steps,
    cs,
    document,
    dout,
    R1,  # gradient of the state that leaves the span, as its two tiles
    R2,
    dx,
    ux,
    v,
    seqlen,
    first,  # token of the span
    columns,  # the program's channels
    x_strides: tl.constexpr,
    B_strides: tl.constexpr,
    C_strides: tl.constexpr,
    dout_strides: tl.constexpr,
    h: tl.constexpr,
    p: tl.constexpr,
    n: tl.constexpr,
    SPAN_CHUNKS: tl.constexpr,
    Q: tl.constexpr,
    P_TILE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Store dx, u·x and v of P_TILE channels of one head over one span; return their dD, (P_TILE), zero without D."""
    SPAN: tl.constexpr = SPAN_CHUNKS * Q
    rows = tl.arange(0, Q)
    narrow = x.dtype.element_ty
    state1, state2 = R1.to(tl.float32), R2.to(tl.float32)
    dD = tl.zeros((P_TILE,), dtype=tl.float32)
    count = tl.minimum(SPAN_CHUNKS, tl.cdiv(seqlen - first, Q))
    for back in tl.range(0, count, num_stages=STAGES, disable_licm=True):
        start = first + (count - 1 - back) * Q
        left = seqlen - start
        step = load_steps(steps, start, seqlen, Q)
        decay, number, into, out, through = load_chunk_decays(cs, document, start, seqlen, Q, SPAN)

        # Through the state that the chunk leaves.
        B1, B2 = load_rows(B, start, seqlen, B_strides, n, Q, N1, N2)
        u = dot_state(B1, B2, state1.to(narrow), state2.to(narrow), N2, PRECISION) * out[:, None]
        x_wide = load_head(x, start, seqlen, columns, x_strides, p, Q).to(tl.float32)
        tl.store(v + start + rows, tl.sum(u * x_wide, axis=1) * step, mask=rows < left)
        # Through the tokens of the chunk.
        C1, C2 = load_rows(C, start, seqlen, C_strides, n, Q, N1, N2)
        scores = dot_rows(B1, B2, C1, C2, N2, PRECISION)  # (j, i)
        scores *= tl.exp2(tl.minimum(decay[None, :] - decay[:, None], 0.0))
        visible = rows[:, None] <= rows[None, :]
        if document is not None:
            visible = visible & (number[:, None] == number[None, :])
        dy = load_head(dout, start, seqlen, columns, dout_strides, p, Q)
        u = dot(tl.where(visible, scores, 0.0).to(narrow), dy, u, PRECISION)
        tl.store(ux + start + rows, tl.sum(u * x_wide, axis=1), mask=rows < left)
        u *= step[:, None]
        if skip is not None:
            dy_wide = dy.to(tl.float32)
            u += dy_wide * skip[None, :]
            dD += tl.sum(dy_wide * x_wide, axis=0)
        store_tile(dx + tl.cast(start, tl.int64) * (h * p), rows, left, columns, p, h * p, u)

        state1, state2 = add_outer(state1, state2, C1, C2, scaled(dy, into), through, N2, PRECISION)
    return dD
