"""SSD backward, first part: dx in one walk over the sequence, from its end. The mirror image of the forward scan.

Inside a chunk of Q tokens, with `cs` the inclusive cumulative sum of dt A, E_ij = exp(cs_i - cs_j) for j <= i, and R
the gradient of the state after the chunk:

    u_j    = Σ_{i>=j} (C_i·B_j) E_ij dout_i + exp(cs_last - cs_j) Rᵀ B_j
    dx_j   = dt_j u_j + D dout_j        dD = Σ_j dout_j·x_j        u_j·x_j is kept: the part of ddt_j that it is
    R_prev = exp(cs_last) R + Σ_i exp(cs_i) C_i dout_iᵀ

R never leaves registers, except for a copy in the input's dtype as it leaves each span of s tokens, from which
`triton_gradient` goes on.

Bytes per token, 16-bit input: x, dout, dx 6 h p; B, C 4 g n; steps, cs 8 h; u·x 4 h; R 2 h p n / s. With a gate, one
launch before: z, dout, y in, dy and dz out, 10 h p.
"""

import triton
import triton.language as tl

from mamba2.ops.ssd.triton_common import (
    add_outer,
    dot,
    dot_rows,
    dot_state,
    give,
    keep,
    load_chunk_decays,
    load_given,
    load_head,
    load_kept,
    load_rows,
    load_tile,
    scaled,
    store_tile,
    zero_state,
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
def _reverse_kernel(
    x,  # (b, l, h, p)
    B,  # (b, l, g, n)
    C,  # (b, l, g, n)
    D,  # (h) or (h, p), or None
    steps,  # (b, h, l)
    cs,  # (b, h, l)
    document,  # (b, l) or None
    dout,  # (b, l, h, p)
    carry,  # gradient of the final state (b, h, p, n), or None; unused when FROM_KEPT
    kept,  # (b, spans, h, n, p): out; in when FROM_KEPT
    dx,  # out: (b, l, h, p); this and all below contiguous
    ux,  # out: (b, h, l), float32
    dD,  # out: (rows, h, p) or (rows * p tiles, h), float32, or None; a row for each sequence, or span of it
    initial,  # out: gradient of the initial state (b, h, p, n), or None; unused when FROM_KEPT
    batch_strides,  # of x, B, C, dout, carry
    seqlen,
    spans,
    x_strides: tl.constexpr,
    B_strides: tl.constexpr,
    C_strides: tl.constexpr,
    D_strides: tl.constexpr,
    dout_strides: tl.constexpr,
    carry_strides: tl.constexpr,
    h: tl.constexpr,
    p: tl.constexpr,
    n: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    SPAN_CHUNKS: tl.constexpr,
    Q: tl.constexpr,
    P_TILE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    FROM_KEPT: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (h * p tiles, b, FROM_KEPT ? spans : 1). A program owns P_TILE channels of one head, over the sequence.

    FROM_KEPT: over one span only, from the gradient that earlier launches left in `kept`.
    """
    p_tiles: tl.constexpr = (p + P_TILE - 1) // P_TILE
    SPAN: tl.constexpr = SPAN_CHUNKS * Q
    tile = tl.program_id(0) % p_tiles
    head = (tl.program_id(0) // p_tiles).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    group = head // HEADS_PER_GROUP
    columns = tile * P_TILE + tl.arange(0, P_TILE)
    rows = tl.arange(0, Q)
    narrow = x.dtype.element_ty

    x += batch * batch_strides[0] + head * x_strides[1]
    B += batch * batch_strides[1] + group * B_strides[1]
    C += batch * batch_strides[2] + group * C_strides[1]
    dout += batch * batch_strides[3] + head * dout_strides[1]
    steps += (batch * h + head) * seqlen
    cs += (batch * h + head) * seqlen
    ux += ((batch * h + head) * p_tiles + tile) * seqlen
    if document is not None:
        document += batch * seqlen
    kept += (batch * spans * h + head) * (n * p)
    if D is not None:
        skip = tl.load(D + head * D_strides[0] + columns * D_strides[1], mask=columns < p, other=0.0).to(tl.float32)

    first = tl.program_id(2) * SPAN_CHUNKS
    count = tl.cdiv(seqlen, Q)
    state1, state2 = zero_state(P_TILE, N1, N2)
    if FROM_KEPT:
        count = tl.minimum(SPAN_CHUNKS, count - first)
        state1, state2 = load_kept(kept + tl.program_id(2).to(tl.int64) * h * (n * p), columns, p, n, N1, N2)
        state1, state2 = state1.to(tl.float32), state2.to(tl.float32)
    elif carry is not None:
        carry += batch * batch_strides[4] + head * carry_strides[0]
        state1, state2 = load_given(carry, columns, carry_strides, p, n, N1, N2)

    dD_sum = tl.zeros((P_TILE,), dtype=tl.float32)
    for back in tl.range(0, count, num_stages=STAGES, disable_licm=True):
        chunk = first + count - 1 - back
        start = chunk * Q
        left = seqlen - start
        step, decay, number, into, out, through = load_chunk_decays(steps, cs, document, start, seqlen, Q, SPAN)
        narrow1, narrow2 = state1.to(narrow), state2.to(narrow)
        if not FROM_KEPT:
            leaves = ((chunk + 1) % SPAN_CHUNKS == 0) | (back == 0)
            here = kept + tl.cast(chunk // SPAN_CHUNKS, tl.int64) * h * (n * p)
            keep(here, narrow1, narrow2, columns, p, tl.where(leaves, n, 0), N1, N2)

        # Through the state that the chunk leaves.
        B1, B2 = load_rows(B, start, seqlen, B_strides, n, Q, N1, N2)
        u = dot_state(B1, B2, narrow1, narrow2, N2, PRECISION) * out[:, None]
        # Through the tokens of the chunk.
        C1, C2 = load_rows(C, start, seqlen, C_strides, n, Q, N1, N2)
        scores = dot_rows(B1, B2, C1, C2, N2, PRECISION)  # (j, i)
        scores *= tl.exp2(tl.minimum(decay[None, :] - decay[:, None], 0.0))
        visible = rows[:, None] <= rows[None, :]
        if document is not None:
            visible = visible & (number[:, None] == number[None, :])
        dy = load_head(dout, start, seqlen, columns, dout_strides, p, Q)
        u = dot(tl.where(visible, scores, 0.0).to(narrow), dy, u, PRECISION)
        x_wide = load_head(x, start, seqlen, columns, x_strides, p, Q).to(tl.float32)
        tl.store(ux + start + rows, tl.sum(u * x_wide, axis=1), mask=rows < left)
        u *= step[:, None]
        if D is not None:
            dy_wide = dy.to(tl.float32)
            u += dy_wide * skip[None, :]
            dD_sum += tl.sum(dy_wide * x_wide, axis=0)
        token = ((batch * seqlen + start) * h + head) * p
        store_tile(dx + token, rows, left, columns, p, h * p, u)

        state1, state2 = add_outer(state1, state2, C1, C2, scaled(dy, into), through, N2, PRECISION)

    if D is not None:
        row = batch * tl.num_programs(2) + tl.program_id(2)
        if D_PER_CHANNEL:
            tl.store(dD + (row * h + head) * p + columns, dD_sum, mask=columns < p)
        else:
            tl.store(dD + (row * p_tiles + tile) * h + head, tl.sum(dD_sum, axis=0))
    if initial is not None and not FROM_KEPT:
        give(initial + (batch * h + head) * (n * p), state1, state2, columns, p, n, N1, N2)
