"""SSD backward: two launches that visit the inputs, two small ones that finish what is summed over tokens.

For a run of tokens with incoming state S and R the gradient of its outgoing state, i and j tokens of it, `cs` the
inclusive cumulative sum of dt A, CB_ij = C_i·B_j, E_ij = exp(cs_i - cs_j) for j <= i:

    u_j    = Σ_{i>=j} CB_ij E_ij dout_i + exp(cs_last - cs_j) Rᵀ B_j
    dx_j   = dt_j u_j + D dout_j       ddt_j += u_j·x_j       dD = Σ dout_j·x_j
    R_prev = exp(cs_last) R + Σ_i exp(cs_i) C_i dout_iᵀ
    dCB_ij = Σ_heads (dout_i·x_j) dt_j E_ij
    dC_i   = Σ_j dCB_ij B_j + Σ_heads exp(cs_i) S dout_i
    dB_j   = Σ_i dCB_ij C_i + Σ_heads exp(cs_last - cs_j) dt_j R x_j

and for the decays a_k = dt_k A, with W_ij = (dout_i·x_j) dt_j E_ij CB_ij (j < i), s_i = exp(cs_i) dout_i·(Sᵀ C_i),
v_j = exp(cs_last - cs_j) dt_j x_j·(Rᵀ B_j):

    da_k   = Σ_{j<k<=i} W_ij + Σ_{i>=k} s_i + Σ_{j<k} v_j + exp(cs_last) <R, S>
           = Σ_{i>=k} (Σ_j W_ij - Σ_j W_ji + s_i) + Σ_{j<k} v_j + exp(cs_last) <R, S>
    ddt_k += A da_k      dA = Σ_k dt_k da_k      then through the clamp and softplus; d(dt_bias) = Σ_k d(dt_raw)_k

1. `_reverse_kernel` mirrors the forward scan: runs are chunks of Q tokens, from the last to the first, R is carried in
   registers and kept once per span. It makes dx and u·x.
2. `_gradient_kernel` takes spans as runs, in blocks of Q tokens, between the kept S and R. A program sums over the
   heads of a group, so that dB and dC are written once, and leaves the sums of W by row and by column, s and v.
3. `_finish_kernel` adds these up over a span: ddt, and the span's share of dA and d(dt_bias).
4. `_reduce_kernel` sums the shares over spans and sequences, in a fixed order.

Bytes per token, 16-bit input, span s, blocks of Q tokens:
1. x, dout, dx 6 h p; B, C 4 g n; steps, cs 8 h; u·x 4 h; R 2 h p n / s
2. x, dout 4 h p; B, C, dB, dC 8 g n; steps, cs 8 h; S, R 4 h p n / s; sums of W, s, v 8 h s / Q + 8 h
3. the float32 sums and steps once more, dt and ddt 4 h
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
from mamba2.ops.ssd.triton_decays import activate
from mamba2.ops.triton_math import sigmoid, silu, silu_slope


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


@triton.jit
def _gradient_kernel(
    x,  # (b, l, h, p)
    B,  # (b, l, g, n)
    C,  # (b, l, g, n)
    steps,  # (b, h, l)
    cs,  # (b, h, l)
    ends,  # (b, h, chunks)
    document,  # (b, l) or None
    dout,  # (b, l, h, p)
    kept_S,  # states entering each span: (b, spans, h, n, p)
    kept_R,  # gradients of the states leaving each span: (b, spans, h, n, p)
    dB,  # out: (b, l, g, n), contiguous
    dC,  # out: (b, l, g, n), contiguous
    sums,  # out: (2 d + 2, b, h, l), float32; d planes of sums of W by row, d by column, s, v
    RS,  # out: exp(cs_last) <R, S> of each span: (b, spans, h), float32
    batch_strides,  # of x, B, C, dout
    seqlen,
    spans,
    plane,  # elements of one of `sums`
    x_strides: tl.constexpr,
    B_strides: tl.constexpr,
    C_strides: tl.constexpr,
    dout_strides: tl.constexpr,
    h: tl.constexpr,
    p: tl.constexpr,
    n: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    SPAN_CHUNKS: tl.constexpr,
    Q: tl.constexpr,
    P_TILE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (2 * blocks, g, b). Two programs share a block of Q tokens of one group, each with all heads of the group.

    The even one takes its tokens as j, the writers, and makes dB; the odd one as i, the readers, and makes dC. W is
    summed by the writers' program. The one for blocks j and i = j + d fills plane d of the sums by row at i and of
    those by column at j, so that no two programs write to one place.
    """
    ngroups: tl.constexpr = h // HEADS_PER_GROUP
    group = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    head = group * HEADS_PER_GROUP  # the group's first
    block = tl.program_id(0) // 3
    start = block * Q
    span = block // SPAN_CHUNKS
    first = span * SPAN_CHUNKS * Q
    end = tl.minimum(first + SPAN_CHUNKS * Q, seqlen)

    x += batch * batch_strides[0] + head * x_strides[1]
    B += batch * batch_strides[1] + group * B_strides[1]
    C += batch * batch_strides[2] + group * C_strides[1]
    dout += batch * batch_strides[3] + head * dout_strides[1]
    steps += (batch * h + head) * seqlen
    cs += (batch * h + head) * seqlen
    ends += (batch * h + head) * tl.cdiv(seqlen, Q)
    sums += (batch * h + head) * seqlen
    if document is not None:
        document += batch * seqlen
    plane = tl.cast(plane, tl.int64)
    kept = (batch * spans + span) * h + head
    here = ((batch * seqlen + start) * ngroups + group) * n
    if tl.program_id(0) % 3 == 0:
        _write_block(
            x,
            B,
            C,
            steps,
            cs,
            ends,
            document,
            dout,
            kept_R + kept * (n * p),
            dB + here,
            sums,
            seqlen,
            plane,
            start,
            first,
            end,
            x_strides,
            B_strides,
            C_strides,
            dout_strides,
            ngroups,
            p,
            n,
            HEADS_PER_GROUP,
            SPAN_CHUNKS,
            Q,
            P_TILE,
            N1,
            N2,
            PRECISION,
        )
    elif tl.program_id(0) % 3 == 1:
        _read_block(
            x,
            B,
            C,
            steps,
            cs,
            ends,
            document,
            dout,
            kept_S + kept * (n * p),
            dC + here,
            sums + 2 * SPAN_CHUNKS * plane,
            seqlen,
            start,
            first,
            x_strides,
            B_strides,
            C_strides,
            dout_strides,
            ngroups,
            p,
            n,
            HEADS_PER_GROUP,
            Q,
            P_TILE,
            N1,
            N2,
            PRECISION,
        )
    elif start == first:
        _state_products(
            kept_S + kept * (n * p),
            kept_R + kept * (n * p),
            RS + kept,
            ends,
            document,
            seqlen,
            end,
            p,
            n,
            HEADS_PER_GROUP,
            Q,
            P_TILE,
            N1,
            N2,
        )


@triton.jit
def _write_block(
    x,  # pointers to the sequence's first token, and the group's first head
    B,
    C,
    steps,
    cs,
    ends,
    document,
    dout,
    kept_R,
    dB,  # to the block's first token
    sums,
    seqlen,
    plane,
    start,  # of the block
    first,  # of the span
    end,  # of the span
    x_strides: tl.constexpr,
    B_strides: tl.constexpr,
    C_strides: tl.constexpr,
    dout_strides: tl.constexpr,
    ngroups: tl.constexpr,
    p: tl.constexpr,
    n: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    SPAN_CHUNKS: tl.constexpr,
    Q: tl.constexpr,
    P_TILE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dB, v and the sums of W, of a block of writers j: through R, then through the readers i of its span."""
    p_tiles: tl.constexpr = (p + P_TILE - 1) // P_TILE
    rows = tl.arange(0, Q)
    narrow = x.dtype.element_ty
    dB1, dB2 = zero_state(Q, N1, N2)  # transposed: (N1, Q), (N2, Q)

    for r in tl.range(0, HEADS_PER_GROUP, disable_licm=True):
        to_head = tl.cast(r, tl.int64)
        at = to_head * seqlen
        weight = _write_weights(
            steps + at, cs + at, ends + to_head * tl.cdiv(seqlen, Q), document, start, end, seqlen, Q
        )
        v = tl.zeros((Q,), dtype=tl.float32)
        for tile in tl.range(0, p_tiles, disable_licm=True):
            columns = tile * P_TILE + tl.arange(0, P_TILE)
            R1, R2 = load_kept(kept_R + to_head * (n * p), columns, p, n, N1, N2)
            x_tile = load_head(x + to_head * x_strides[1], start, seqlen, columns, x_strides, p, Q)
            B1, B2 = load_rows(B, start, seqlen, B_strides, n, Q, N1, N2)
            part1 = dot(R1, tl.trans(x_tile), None, PRECISION) * weight[None, :]
            v += tl.sum(part1 * tl.trans(B1).to(tl.float32), axis=0)
            dB1 += part1
            if N2 > 0:
                part2 = dot(R2, tl.trans(x_tile), None, PRECISION) * weight[None, :]
                v += tl.sum(part2 * tl.trans(B2).to(tl.float32), axis=0)
                dB2 += part2
        tl.store(sums + (2 * SPAN_CHUNKS + 1) * plane + at + start + rows, v, mask=start + rows < seqlen)

    for d in tl.range(0, tl.cdiv(end - start, Q), disable_licm=True):
        readers = start + d * Q
        B1, B2 = load_rows(B, start, seqlen, B_strides, n, Q, N1, N2)
        C1, C2 = load_rows(C, readers, seqlen, C_strides, n, Q, N1, N2)
        BC = dot_rows(B1, B2, C1, C2, N2, PRECISION)  # (j, i)
        dBC = tl.zeros((Q, Q), dtype=tl.float32)
        for r in tl.range(0, HEADS_PER_GROUP, disable_licm=True):
            to_head = tl.cast(r, tl.int64)
            at = to_head * seqlen
            pairs = _pairs(
                x + to_head * x_strides[1],
                dout + to_head * dout_strides[1],
                steps + at,
                cs + at,
                ends + to_head * tl.cdiv(seqlen, Q),
                document,
                start,
                readers,
                seqlen,
                x_strides,
                dout_strides,
                p,
                Q,
                P_TILE,
                PRECISION,
            )
            dBC += pairs
            W = tl.where(start + rows[:, None] == readers + rows[None, :], 0.0, pairs * BC)
            row_sums = sums + d * plane + at + readers + rows
            column_sums = sums + (SPAN_CHUNKS + d) * plane + at + start + rows
            tl.store(row_sums, tl.sum(W, axis=0), mask=readers + rows < seqlen)
            tl.store(column_sums, tl.sum(W, axis=1), mask=start + rows < seqlen)
        C1, C2 = load_rows(C, readers, seqlen, C_strides, n, Q, N1, N2)
        dB1, dB2 = add_outer(dB1, dB2, C1, C2, tl.trans(dBC.to(narrow)), 1.0, N2, PRECISION)
    _store_rows(dB, dB1, dB2, seqlen - start, ngroups, n, Q, N1, N2)


@triton.jit
def _read_block(
    x,  # pointers to the sequence's first token, and the group's first head
    B,
    C,
    steps,
    cs,
    ends,
    document,
    dout,
    kept_S,
    dC,  # to the block's first token
    s_out,
    seqlen,
    start,  # of the block
    first,  # of the span
    x_strides: tl.constexpr,
    B_strides: tl.constexpr,
    C_strides: tl.constexpr,
    dout_strides: tl.constexpr,
    ngroups: tl.constexpr,
    p: tl.constexpr,
    n: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    Q: tl.constexpr,
    P_TILE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dC and s of a block of readers i: through S, then through the writers j of its span."""
    p_tiles: tl.constexpr = (p + P_TILE - 1) // P_TILE
    rows = tl.arange(0, Q)
    narrow = x.dtype.element_ty
    dC1, dC2 = zero_state(Q, N1, N2)  # transposed: (N1, Q), (N2, Q)

    for r in tl.range(0, HEADS_PER_GROUP, disable_licm=True):
        to_head = tl.cast(r, tl.int64)
        at = to_head * seqlen
        into = _read_weights(cs + at, ends + to_head * tl.cdiv(seqlen, Q), document, start, first, seqlen, Q)
        s = tl.zeros((Q,), dtype=tl.float32)
        for tile in tl.range(0, p_tiles, disable_licm=True):
            columns = tile * P_TILE + tl.arange(0, P_TILE)
            S1, S2 = load_kept(kept_S + to_head * (n * p), columns, p, n, N1, N2)
            dout_head = dout + to_head * dout_strides[1]
            dy = load_head(dout_head, start, seqlen, columns, dout_strides, p, Q)
            C1, C2 = load_rows(C, start, seqlen, C_strides, n, Q, N1, N2)
            part1 = dot(S1, tl.trans(dy), None, PRECISION) * into[None, :]
            s += tl.sum(part1 * tl.trans(C1).to(tl.float32), axis=0)
            dC1 += part1
            if N2 > 0:
                part2 = dot(S2, tl.trans(dy), None, PRECISION) * into[None, :]
                s += tl.sum(part2 * tl.trans(C2).to(tl.float32), axis=0)
                dC2 += part2
        tl.store(s_out + at + start + rows, s, mask=start + rows < seqlen)

    for writers in tl.range(first, start + Q, Q, disable_licm=True):
        dBC = tl.zeros((Q, Q), dtype=tl.float32)  # (j, i)
        for r in tl.range(0, HEADS_PER_GROUP, disable_licm=True):
            to_head = tl.cast(r, tl.int64)
            at = to_head * seqlen
            dBC += _pairs(
                x + to_head * x_strides[1],
                dout + to_head * dout_strides[1],
                steps + at,
                cs + at,
                ends + to_head * tl.cdiv(seqlen, Q),
                document,
                writers,
                start,
                seqlen,
                x_strides,
                dout_strides,
                p,
                Q,
                P_TILE,
                PRECISION,
            )
        B1, B2 = load_rows(B, writers, seqlen, B_strides, n, Q, N1, N2)
        dC1, dC2 = add_outer(dC1, dC2, B1, B2, dBC.to(narrow), 1.0, N2, PRECISION)
    _store_rows(dC, dC1, dC2, seqlen - start, ngroups, n, Q, N1, N2)


@triton.jit
def _state_products(
    kept_S,
    kept_R,
    RS,
    ends,
    document,
    seqlen,
    end,
    p: tl.constexpr,
    n: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    Q: tl.constexpr,
    P_TILE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
):
    """exp(cs_last) <R, S> of a span, for each head."""
    for r in tl.range(0, HEADS_PER_GROUP, disable_licm=True):
        to_head = tl.cast(r, tl.int64)
        through = tl.exp2(tl.load(ends + to_head * tl.cdiv(seqlen, Q) + (end - 1) // Q))
        if document is not None:
            through = tl.where(tl.load(document + end - 1) == 0, through, 0.0)
        product = 0.0
        for tile in tl.range(0, (p + P_TILE - 1) // P_TILE, disable_licm=True):
            columns = tile * P_TILE + tl.arange(0, P_TILE)
            S1, S2 = load_kept(kept_S + to_head * (n * p), columns, p, n, N1, N2)
            R1, R2 = load_kept(kept_R + to_head * (n * p), columns, p, n, N1, N2)
            product += tl.sum(tl.sum(R1.to(tl.float32) * S1.to(tl.float32), axis=1), axis=0)
            if N2 > 0:
                product += tl.sum(tl.sum(R2.to(tl.float32) * S2.to(tl.float32), axis=1), axis=0)
        tl.store(RS + r, product * through)


@triton.jit
def _write_weights(steps, cs, ends, document, start, end, seqlen, Q: tl.constexpr):
    """exp(cs_last - cs_j) dt_j of the chunk at `start`, up to the end of its span."""
    rows = tl.arange(0, Q)
    inside = start + rows < seqlen
    step = tl.load(steps + start + rows, mask=inside, other=0.0)
    decay = tl.load(cs + start + rows, mask=inside, other=0.0)
    last = tl.load(cs + tl.minimum(start + Q, seqlen) - 1)
    rest = tl.load(ends + (end - 1) // Q) - tl.load(ends + start // Q)
    weight = tl.exp2(tl.minimum(last - decay + rest, 0.0)) * step
    if document is not None:
        number = tl.load(document + start + rows, mask=inside, other=0)
        weight = tl.where(number == tl.load(document + end - 1), weight, 0.0)
    return weight


@triton.jit
def _read_weights(cs, ends, document, start, first, seqlen, Q: tl.constexpr):
    """exp(cs_i) of the chunk at `start`, from the beginning of its span at `first`."""
    rows = tl.arange(0, Q)
    inside = start + rows < seqlen
    before = tl.load(ends + start // Q - 1, mask=start > first, other=0.0)
    weight = tl.exp2(tl.load(cs + start + rows, mask=inside, other=0.0) + before)
    if document is not None:
        weight = tl.where(tl.load(document + start + rows, mask=inside, other=0) == 0, weight, 0.0)
    return weight


@triton.jit
def _pairs(
    x,  # pointers to the sequence's first token, for the head
    dout,
    steps,
    cs,
    ends,
    document,
    writers,  # first token of the block of j
    readers,  # first token of the block of i, of the same span
    seqlen,
    x_strides: tl.constexpr,
    dout_strides: tl.constexpr,
    p: tl.constexpr,
    Q: tl.constexpr,
    P_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(x_j·dout_i) dt_j E_ij, one head's part of dBC: (j, i)."""
    rows = tl.arange(0, Q)
    pairs = tl.zeros((Q, Q), dtype=tl.float32)
    for tile in tl.range(0, (p + P_TILE - 1) // P_TILE, disable_licm=True):
        columns = tile * P_TILE + tl.arange(0, P_TILE)
        x_tile = load_head(x, writers, seqlen, columns, x_strides, p, Q)
        dy = load_head(dout, readers, seqlen, columns, dout_strides, p, Q)
        pairs = dot(x_tile, tl.trans(dy), pairs, PRECISION)
    j, i = writers + rows, readers + rows
    step = tl.load(steps + j, mask=j < seqlen, other=0.0)
    cs_j = tl.load(cs + j, mask=j < seqlen, other=0.0)
    cs_i = tl.load(cs + i, mask=i < seqlen, other=0.0)
    # From the end of j's chunk to the beginning of i's, and to the end of j's from its beginning; 0 in one chunk.
    apart = readers > writers
    between = tl.load(ends + readers // Q - 1, mask=apart, other=0.0) - tl.load(
        ends + writers // Q, mask=apart, other=0.0
    )
    gap = between + tl.load(cs + writers + Q - 1, mask=apart, other=0.0)
    pairs *= tl.exp2(tl.minimum(cs_i[None, :] - cs_j[:, None] + gap, 0.0)) * step[:, None]
    visible = j[:, None] <= i[None, :]
    if document is not None:
        document_j = tl.load(document + j, mask=j < seqlen, other=0)
        document_i = tl.load(document + i, mask=i < seqlen, other=0)
        visible = visible & (document_j[:, None] == document_i[None, :])
    return tl.where(visible, pairs, 0.0)


@triton.jit
def _store_rows(k, k1, k2, left, ngroups: tl.constexpr, n: tl.constexpr, Q: tl.constexpr, N1: tl.constexpr, N2):
    """Store rows of dB or dC, held transposed, contiguous; the pointer is to the first token's group."""
    store_tile(k, tl.arange(0, Q), left, tl.arange(0, N1), n, ngroups * n, tl.trans(k1))
    if N2 > 0:
        store_tile(k, tl.arange(0, Q), left, N1 + tl.arange(0, N2), n, ngroups * n, tl.trans(k2))


@triton.jit
def _finish_kernel(
    dt,  # (b, l, h)
    A,  # (h)
    bias,  # (h) or None
    steps,  # (b, h, l)
    ux,  # (b, h, p tiles, l)
    sums,  # (2 d + 2, b, h, l)
    RS,  # (b, spans, h)
    ddt,  # out: (b, l, h), contiguous
    shares,  # out: (b, spans, 2 h), float32: dA, d(dt_bias)
    dt_batch,
    seqlen,
    spans,
    plane,
    low,
    high,
    dt_strides: tl.constexpr,
    h: tl.constexpr,
    P_TILES: tl.constexpr,
    SPAN_CHUNKS: tl.constexpr,
    Q: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """Grid (spans, h, b). A span's tokens are held as (chunks, Q).

    Pairs of one chunk cancel in the difference of their sums by row and by column where both come after k. Those of two
    chunks are added where they count and nowhere else, so that a longer span loses no digits.
    """
    SPAN: tl.constexpr = SPAN_CHUNKS * Q
    span = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start = span * SPAN
    chunk = tl.arange(0, SPAN_CHUNKS)
    tokens = chunk[:, None] * Q + tl.arange(0, Q)[None, :]
    inside = start + tokens < seqlen
    chunks = tl.cdiv(tl.minimum(SPAN, seqlen - start), Q)
    sequence = batch * h + head
    plane = tl.cast(plane, tl.int64)
    sums += sequence * seqlen + start + tokens

    s = tl.load(sums + 2 * SPAN_CHUNKS * plane, mask=inside, other=0.0)
    v = tl.load(sums + (2 * SPAN_CHUNKS + 1) * plane, mask=inside, other=0.0)
    after = s + tl.load(sums, mask=inside, other=0.0)  # to be summed over i >= k of k's chunk
    after -= tl.load(sums + SPAN_CHUNKS * plane, mask=inside, other=0.0)
    before = v  # over j < k of k's chunk
    share = (batch * spans + span) * h + head
    later = chunk[None, :] > chunk[:, None]
    across = tl.load(RS + share) + tl.sum(tl.where(later, tl.sum(s, axis=1)[None, :], 0.0), axis=1)
    across += tl.sum(tl.where(later, tl.sum(v, axis=1)[:, None], 0.0), axis=0)
    for d in tl.static_range(1, SPAN_CHUNKS):
        by_row = tl.load(sums + d * plane, mask=inside & (chunk[:, None] >= d), other=0.0)
        after += by_row
        before += tl.load(sums + (SPAN_CHUNKS + d) * plane, mask=inside & (chunk[:, None] + d < chunks), other=0.0)
        # from a chunk before k's to one after it
        spans_k = later & (chunk[None, :] - d < chunk[:, None])
        across += tl.sum(tl.where(spans_k, tl.sum(by_row, axis=1)[None, :], 0.0), axis=1)
    da = tl.cumsum(after, axis=1, reverse=True) + tl.cumsum(before, axis=1) - before + across[:, None]
    gradient = da * tl.load(A + head).to(tl.float32)
    for tile in tl.static_range(P_TILES):
        gradient += tl.load(ux + (sequence * P_TILES + tile) * seqlen + start + tokens, mask=inside, other=0.0)

    dt += batch * dt_batch + head * dt_strides[1] + tl.cast(start, tl.int64) * dt_strides[0]
    raw, activated = activate(dt, dt_strides[0], tokens, seqlen - start, bias, head, SOFTPLUS)
    gradient = tl.where(inside & (activated >= low) & (activated <= high), gradient, 0.0)
    if SOFTPLUS:
        gradient *= sigmoid(raw)
    ddt += (batch * seqlen + start) * h + head
    tl.store(ddt + tokens * h, gradient.to(ddt.dtype.element_ty), mask=inside)
    step = tl.load(steps + sequence * seqlen + start + tokens, mask=inside, other=0.0)
    shares += (batch * spans + span) * (2 * h) + head
    tl.store(shares, tl.sum(tl.sum(step * da, axis=1), axis=0))
    tl.store(shares + h, tl.sum(tl.sum(gradient, axis=1), axis=0))


@triton.jit
def _reduce_kernel(
    shares,  # (count, 2 h), float32
    D_shares,  # (D_count, d), float32, or None
    dA,  # out: (h)
    dbias,  # out: (h) or None
    dD,  # out: (d) or None
    count,
    D_count,
    h: tl.constexpr,
    d: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (tiles of COLUMNS of 2 h, then of d). Sums over the rows, always in the same order."""
    tiles: tl.constexpr = (2 * h + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0)
    if tile < tiles:
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        total = _sum_rows(shares, columns, count, 2 * h, ROWS)
        tl.store(dA + columns, total.to(dA.dtype.element_ty), mask=columns < h)
        if dbias is not None:
            tl.store(dbias + columns - h, total.to(dbias.dtype.element_ty), mask=(columns >= h) & (columns < 2 * h))
    elif dD is not None:
        columns = (tile - tiles) * COLUMNS + tl.arange(0, COLUMNS)
        total = _sum_rows(D_shares, columns, D_count, d, ROWS)
        tl.store(dD + columns, total.to(dD.dtype.element_ty), mask=columns < d)


@triton.jit
def _sum_rows(shares, columns, count, width: tl.constexpr, ROWS: tl.constexpr):
    total = tl.zeros_like(columns).to(tl.float32)
    for first in range(0, count, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows[:, None] < count) & (columns[None, :] < width)
        offsets = rows.to(tl.int64)[:, None] * width + columns[None, :]
        total += tl.sum(tl.load(shares + offsets, mask=mask, other=0.0), axis=0)
    return total
