"""SSD backward, after R: dx, dB and dC, and sums from which `triton_finish` makes the gradient of dt.

For a span with incoming state S and R the gradient of its outgoing state, i and j tokens of it, `cs` the inclusive
cumulative sum of dt A, CB_ij = C_i·B_j, E_ij = exp(cs_i - cs_j) for j <= i:

    dCB_ij = Σ_heads (dout_i·x_j) dt_j E_ij
    dC_i   = Σ_j dCB_ij B_j + Σ_heads exp(cs_i) S dout_i
    dB_j   = Σ_i dCB_ij C_i + Σ_heads exp(cs_last - cs_j) dt_j R x_j
    dx_j   see `triton_reverse`

A program for dB or dC sums over the heads of a group in registers, so that they are written once. For the gradient of
dt the launch leaves s_i = exp(cs_i) dout_i·(Sᵀ C_i), exp(cs_last) <R, S>, sums by row of
W_ij = (dout_i·x_j) dt_j E_ij CB_ij, j < i, less those by column where i and j share a block, and for each block the sum
of exp(cs_last - cs_j) dt_j x_j·(Rᵀ B_j); those of `triton_reverse` too.

Programs of one span and group are neighbours in the grid: x, dout, B and C reach the device once, then come from L2
(on AMD, where the three kinds of program are launched one by one, once for each).

Bytes per token, 16-bit input, spans of s tokens, blocks of Q: x, dout, dx 6 h p; B, C, dB, dC 8 g n; steps, cs 8 h;
S, R 4 h p n / s; sums of W 2 h (s / Q + 1); s, v and u·x 12 h. Where a sequence begins without a state, or its last
state has no gradient, S and R are zero there: they, and what follows from them, are neither written nor read.
"""

import triton
import triton.language as tl

from mamba2.ops.ssd.triton_common import (
    add_outer,
    dot,
    dot_rows,
    load_head,
    load_kept,
    load_rows,
    span_states,
    store_tile,
    zero_state,
)
from mamba2.ops.ssd.triton_reverse import walk_span


@triton.jit
def _gradient_kernel(
    x,  # (b, l, h, p)
    B,  # (b, l, g, n)
    C,  # (b, l, g, n)
    D,  # (h) or (h, p), or None
    steps,  # (b, h, l)
    cs,  # (b, h, l)
    ends,  # (b, h, chunks)
    document,  # (b, l) or None
    dout,  # (b, l, h, p)
    kept_S,  # states entering each span: (b, spans, h, n, p)
    kept_R,  # gradients of the states leaving each span: (b, spans, h, n, p)
    dx,  # out: (b, l, h, p); this and all below contiguous
    dB,  # out: (b, l, g, n)
    dC,  # out: (b, l, g, n)
    dD,  # out: (b * spans, h, p) or (b * spans * p tiles, h), float32, or None
    sums,  # out: (d + 1, b, h, l), float32; d planes of sums of W, then s
    walked,  # out: (2, b, h, p tiles, l), float32: u·x, v
    totals,  # out: (b, h, chunks), float32: sums over a block that reach the end of its span
    RS,  # out: exp(cs_last) <R, S> of each span: (b, spans, h, p tiles), float32
    batch_strides,  # of x, B, C, dout
    seqlen,
    spans,
    plane,  # elements of one of `sums`
    x_strides: tl.constexpr,
    B_strides: tl.constexpr,
    C_strides: tl.constexpr,
    D_strides: tl.constexpr,
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
    PART: tl.constexpr,
    INITIAL: tl.constexpr,
    CARRY: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (spans * roles, g, b). Of a group, a span has one program for each head and P_TILE channels, which walks
    the span for dx, and two for each block of Q tokens, each with all heads of the group. A launch has all of these,
    or with PART "walk", "write" or "read" those of one kind.

    Of the two, one takes its tokens as j, the writers, and makes dB; the other as i, the readers, and makes dC. W is
    summed by the writers' program. The one for blocks j and i = j + d fills plane d of the sums at i, so that no two
    programs write to one place.
    """
    ngroups: tl.constexpr = h // HEADS_PER_GROUP
    p_tiles: tl.constexpr = (p + P_TILE - 1) // P_TILE
    walks: tl.constexpr = HEADS_PER_GROUP * p_tiles if PART == "all" or PART == "walk" else 0
    kinds: tl.constexpr = 2 if PART == "all" else 1
    roles: tl.constexpr = walks + (0 if PART == "walk" else kinds * SPAN_CHUNKS)
    group = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    head = group * HEADS_PER_GROUP  # the group's first
    span = tl.program_id(0) // roles
    role = tl.program_id(0) % roles
    first = span * SPAN_CHUNKS * Q
    end = tl.minimum(first + SPAN_CHUNKS * Q, seqlen)

    x += batch * batch_strides[0] + head * x_strides[1]
    B += batch * batch_strides[1] + group * B_strides[1]
    C += batch * batch_strides[2] + group * C_strides[1]
    dout += batch * batch_strides[3] + head * dout_strides[1]
    steps += (batch * h + head) * seqlen
    cs += (batch * h + head) * seqlen
    ends += (batch * h + head) * tl.cdiv(seqlen, Q)
    if document is not None:
        document += batch * seqlen
    plane = tl.cast(plane, tl.int64)
    row = batch * spans + span
    kept_S += (row * h + head) * (n * p)
    kept_R += (row * h + head) * (n * p)
    enters, leaves = span_states(span, spans, INITIAL, CARRY)
    if PART == "all":
        walking = role < walks
        writing = (role - walks) % 2 == 0
    else:
        walking: tl.constexpr = PART == "walk"
        writing: tl.constexpr = PART == "write"
    if walking:
        r = (role // p_tiles).to(tl.int64)
        tile = role % p_tiles
        head += r
        columns = tile * P_TILE + tl.arange(0, P_TILE)
        steps += r * seqlen
        cs += r * seqlen
        ends += r * tl.cdiv(seqlen, Q)
        R1, R2 = load_kept(kept_R + r * (n * p), columns, p, tl.where(leaves, n, 0), N1, N2)
        if enters & leaves:
            S1, S2 = load_kept(kept_S + r * (n * p), columns, p, n, N1, N2)
            here = (row * h + head) * p_tiles + tile
            tl.store(RS + here, _through_span(R1, R2, S1, S2, ends, document, end, Q, N2))
        skip = None
        if D is not None:
            skip = tl.load(D + head * D_strides[0] + columns * D_strides[1], mask=columns < p, other=0.0)
            skip = skip.to(tl.float32)
        ux = walked + ((batch * h + head) * p_tiles + tile) * seqlen
        dD_sum = walk_span(
            x + r * x_strides[1],
            B,
            C,
            skip,
            steps,
            cs,
            document,
            dout + r * dout_strides[1],
            R1,
            R2,
            dx + (batch * seqlen * h + head) * p,
            ux,
            ux + plane * p_tiles,
            seqlen,
            first,
            columns,
            x_strides,
            B_strides,
            C_strides,
            dout_strides,
            h,
            p,
            n,
            SPAN_CHUNKS,
            Q,
            P_TILE,
            N1,
            N2,
            PRECISION,
            STAGES,
        )
        if D is not None:
            if D_PER_CHANNEL:
                tl.store(dD + (row * h + head) * p + columns, dD_sum, mask=columns < p)
            else:
                tl.store(dD + (row * p_tiles + tile) * h + head, tl.sum(dD_sum, axis=0))
    else:
        start = first + (role - walks) // kinds * Q
        sums += (batch * h + head) * seqlen
        here = ((batch * seqlen + start) * ngroups + group) * n
        if start >= seqlen:
            return
        if writing:
            _write_block(
                x,
                B,
                C,
                steps,
                cs,
                ends,
                document,
                dout,
                kept_R,
                leaves,
                dB + here,
                sums,
                totals + (batch * h + head) * tl.cdiv(seqlen, Q),
                seqlen,
                plane,
                start,
                end,
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
        else:
            _read_block(
                x,
                B,
                C,
                steps,
                cs,
                ends,
                document,
                dout,
                kept_S,
                enters,
                dC + here,
                sums + SPAN_CHUNKS * plane,
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
    leaves,  # whether there is one
    dB,  # to the block's first token
    sums,
    totals,
    seqlen,
    plane,
    start,  # of the block
    end,  # of the span
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
    """dB, the total and the sums of W, of a block of writers j: through R, then through the readers i of its span."""
    p_tiles: tl.constexpr = (p + P_TILE - 1) // P_TILE
    rows = tl.arange(0, Q)
    narrow = x.dtype.element_ty
    dB1, dB2 = zero_state(Q, N1, N2)  # transposed: (N1, Q), (N2, Q)

    for r in tl.range(0, tl.where(leaves, HEADS_PER_GROUP, 0), disable_licm=True):
        to_head = tl.cast(r, tl.int64)
        at = to_head * seqlen
        weight = _write_weights(
            steps + at, cs + at, ends + to_head * tl.cdiv(seqlen, Q), document, start, end, seqlen, Q
        )
        total = tl.zeros((Q,), dtype=tl.float32)
        for tile in tl.range(0, p_tiles, disable_licm=True):
            columns = tile * P_TILE + tl.arange(0, P_TILE)
            R1, R2 = load_kept(kept_R + to_head * (n * p), columns, p, n, N1, N2)
            x_tile = load_head(x + to_head * x_strides[1], start, seqlen, columns, x_strides, p, Q)
            B1, B2 = load_rows(B, start, seqlen, B_strides, n, Q, N1, N2)
            part1 = dot(R1, tl.trans(x_tile), None, PRECISION) * weight[None, :]
            total += tl.sum(part1 * tl.trans(B1).to(tl.float32), axis=0)
            dB1 += part1
            if N2 > 0:
                part2 = dot(R2, tl.trans(x_tile), None, PRECISION) * weight[None, :]
                total += tl.sum(part2 * tl.trans(B2).to(tl.float32), axis=0)
                dB2 += part2
        # With an axis, Triton 3.7.1 fails to lay this sum out on sm_100.
        tl.store(totals + to_head * tl.cdiv(seqlen, Q) + start // Q, tl.sum(total))

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
            by_reader = tl.sum(W, axis=0)
            if d == 0:
                by_reader -= tl.sum(W, axis=1)
            tl.store(sums + d * plane + at + readers + rows, by_reader, mask=readers + rows < seqlen)
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
    enters,  # whether there is one
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

    for r in tl.range(0, tl.where(enters, HEADS_PER_GROUP, 0), disable_licm=True):
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
def _through_span(R1, R2, S1, S2, ends, document, end, Q: tl.constexpr, N2: tl.constexpr):
    """exp(cs_last) <R, S> of the span that ends at `end`, over the tile's channels."""
    through = tl.exp2(tl.load(ends + (end - 1) // Q))
    if document is not None:
        through = tl.where(tl.load(document + end - 1) == 0, through, 0.0)
    product = tl.sum(tl.sum(R1.to(tl.float32) * S1.to(tl.float32), axis=1), axis=0)
    if N2 > 0:
        product += tl.sum(tl.sum(R2.to(tl.float32) * S2.to(tl.float32), axis=1), axis=0)
    return product * through


@triton.jit
def _store_rows(k, k1, k2, left, ngroups: tl.constexpr, n: tl.constexpr, Q: tl.constexpr, N1: tl.constexpr, N2):
    """Store rows of dB or dC, held transposed, contiguous; the pointer is to the first token's group."""
    store_tile(k, tl.arange(0, Q), left, tl.arange(0, N1), n, ngroups * n, tl.trans(k1))
    if N2 > 0:
        store_tile(k, tl.arange(0, Q), left, N1 + tl.arange(0, N2), n, ngroups * n, tl.trans(k2))
