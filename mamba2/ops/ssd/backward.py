"""dB and dC, from pairs of tokens and from the states before and after a span, summed over heads.

With the factors of `decay.py`, CB_ij = C_i·B_j, and over a span of two chunks, S the state before the first and R the
gradient of the one after the second:

    dC_i = Σ_heads into_i S dout_i + Σ_j (Σ_heads G_ij) B_j            G_ij = (dout_i·x_j) step_j between_ij
    dB_j = Σ_heads out_j step_j R x_j + Σ_i (Σ_heads G_ij) C_i         W_ij = G_ij CB_ij
    s_i  = into_i dout_i·(S C_i)        w_j = out_j step_j x_j·(R B_j)        X = through <R, S>

Here into and out include the decay through the span's other chunk where that lies between a chunk and the state, and
through is that of both chunks. For i in the second chunk and j in the first, step_j between_ij is into_i of the second
times step_j out_j of the first, without an exponential per pair.

A program owns a chunk and some heads of a group, either as readers (tokens i, dC) or as writers (tokens j, dB). Both
run the same code with operands exchanged: their own tokens are the rows, and sums run along rows. Sums over heads stay
in registers. The row sums of W, with s and w, are written for `decay.py`. Row and column sums of W cancel there, so
both kinds compute W from the same numbers.

Bytes per token, 16-bit input: x, dout 4 h p, read again from L2 by the span's other programs; S and R 2 h p n / Q; B,
C, dB, dC 8 g n; decays 8 h; sums 16 h. Bound by instructions: for a chunk of 64 tokens and a head of 64 channels about
800 in each of four warps, 1 100 where the other chunk lies between this one and the state.
"""

from mamba2.ops.language import tl, triton
from mamba2.ops.ssd.decay import between, into, load_decays, out_of, through
from mamba2.ops.ssd.tiles import dot, dot_rows, dot_state, load_head, load_kept, load_rows, store_tile


@triton.jit
def _gradient_kernel(
    x,  # View (b, l, h, p)
    dout,  # View (b, l, h, p)
    B,  # View (b, l, g, n)
    C,  # View (b, l, g, n)
    decays,
    S,  # (b, spans, h, n, p)
    R,  # (b, spans, h, n, p)
    dB,  # out: (parts, b, l, g, n), contiguous
    dC,  # out: (parts, b, l, g, n), contiguous
    sums,
    seqlen,
    Z: tl.constexpr,
    PARTS: tl.constexpr,  # programs that share the heads of a group
    STAGES: tl.constexpr,
):
    """Grid (4 * PARTS * spans, g, b): readers and writers of both chunks of a span."""
    part = tl.program_id(0) // 4 % PARTS
    role = tl.program_id(0) % 4
    chunk = tl.program_id(0) // (4 * PARTS) * 2 + role // 2
    if chunk * Z.Q >= seqlen:
        return
    if role == 0:
        _gradient(dout, x, C, B, decays, S, R, dC, sums, seqlen, (chunk, part), Z, (True, False, PARTS, STAGES))
    elif role == 1:
        _gradient(x, dout, B, C, decays, R, S, dB, sums, seqlen, (chunk, part), Z, (False, True, PARTS, STAGES))
    elif role == 2:
        _gradient(dout, x, C, B, decays, S, R, dC, sums, seqlen, (chunk, part), Z, (True, True, PARTS, STAGES))
    else:
        _gradient(x, dout, B, C, decays, R, S, dB, sums, seqlen, (chunk, part), Z, (False, False, PARTS, STAGES))


@triton.jit
def _gradient(v, other_v, k, other_k, decays, state, other_state, dk, sums, seqlen, place, Z, FORM):
    """Readers have v = dout, k = C, state = S and other_* = x, B, R; writers the other way round.

    FAR: the span's other chunk is between this one and `state`.
    """
    READERS: tl.constexpr = FORM[0]
    FAR: tl.constexpr = FORM[1]
    PARTS: tl.constexpr = FORM[2]
    heads: tl.constexpr = (Z.R + PARTS - 1) // PARTS
    p_tiles: tl.constexpr = (Z.p + Z.P - 1) // Z.P
    DOCUMENTS: tl.constexpr = decays.first is not None
    chunk, part = place
    group = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start = chunk * Z.Q
    far_start = start - Z.Q if READERS == FAR else start + Z.Q  # of the other chunk
    rows = tl.arange(0, Z.Q)
    inside = rows < seqlen - start
    narrow = v.pointer.dtype.element_ty
    k_pair, other_pair = (
        load_rows(k, batch, start, seqlen, group, Z),
        load_rows(other_k, batch, start, seqlen, group, Z),
    )
    # The same in both kinds. The diagonal has no decay: its terms would cancel, and only add rounding to the sums.
    pairs = dot_rows(k_pair, other_pair, Z)
    pairs = tl.where(rows[:, None] == rows[None, :], 0.0, pairs).to(narrow)
    dpairs = tl.full((Z.Q, Z.Q), 0.0, dtype=tl.float32)
    if FAR:
        far_pair = load_rows(other_k, batch, far_start, seqlen, group, Z)
        far_pairs = dot_rows(k_pair, far_pair, Z).to(narrow)
        dfar = tl.full((Z.Q, Z.Q), 0.0, dtype=tl.float32)
    acc1 = tl.full((Z.Q, Z.N1), 0.0, dtype=tl.float32)
    acc2 = acc1
    if Z.N2 > 0:
        acc2 = tl.full((Z.Q, Z.N2), 0.0, dtype=tl.float32)

    spans = tl.cdiv(tl.cdiv(seqlen, Z.Q), 2)
    first_head = group * Z.R + part * heads
    count = tl.minimum(part * heads + heads, Z.R) - part * heads
    for r in tl.range(0, count, num_stages=FORM[3], disable_licm=True):
        head = first_head + r
        here = (batch * Z.h + head) * seqlen + start
        to_kept = ((batch * spans + chunk // 2) * Z.h + head) * (Z.n * Z.p)
        d = load_decays(decays, batch, head, start, seqlen, Z)
        # One product at a time, each used up before the next: together they would not fit into the registers.
        G = tl.full((Z.Q, Z.Q), 0.0, dtype=tl.float32)
        for tile in tl.static_range(p_tiles):
            columns = tile * Z.P + tl.arange(0, Z.P)
            v_tile = load_head(v, batch, start, seqlen, head, columns, Z)
            other_tile = load_head(other_v, batch, start, seqlen, head, columns, Z)
            G = dot(v_tile, tl.trans(other_tile), G, Z)
        G *= between(d, True, not READERS, DOCUMENTS)
        dpairs += G
        by_row = tl.sum(G * pairs.to(tl.float32), axis=1)
        weight = into(d, DOCUMENTS) if READERS else out_of(d, True, DOCUMENTS)
        e = load_decays(decays, batch, head, far_start, seqlen, Z)
        # The last chunk of a sequence can be alone in its span.
        across = tl.where(far_start < seqlen, through(e, DOCUMENTS), 1.0)
        to_state = weight * across if FAR else weight
        by_far = tl.full((Z.Q,), 0.0, dtype=tl.float32)
        if FAR:
            far_weight = out_of(e, True, DOCUMENTS) if READERS else into(e, DOCUMENTS)
            for tile in tl.static_range(p_tiles):
                columns = tile * Z.P + tl.arange(0, Z.P)
                wide = load_head(v, batch, start, seqlen, head, columns, Z).to(tl.float32)
                far_tile = load_head(other_v, batch, far_start, seqlen, head, columns, Z).to(tl.float32)
                far_value = (far_tile * far_weight[:, None]).to(narrow)
                dfar = dot((wide * weight[:, None]).to(narrow), tl.trans(far_value), dfar, Z)
                by_far += tl.sum(wide * dot(far_pairs, far_value, None, Z), axis=1)
            by_far *= weight
        by_state = tl.full((Z.Q,), 0.0, dtype=tl.float32)
        X = 0.0
        for tile in tl.static_range(p_tiles):
            columns = tile * Z.P + tl.arange(0, Z.P)
            v_tile = load_head(v, batch, start, seqlen, head, columns, Z)
            state1, state2 = load_kept(state + to_kept, columns, Z.n, Z)
            by_state += tl.sum(v_tile.to(tl.float32) * dot_state(k_pair, state1, state2, Z), axis=1)
            value = (v_tile.to(tl.float32) * to_state[:, None]).to(narrow)
            acc1 = dot(value, tl.trans(state1), acc1, Z)
            if Z.N2 > 0:
                acc2 = dot(value, tl.trans(state2), acc2, Z)
            if READERS and not FAR:
                other1, other2 = load_kept(other_state + to_kept, columns, Z.n, Z)
                X += _inner(state1, other1)
                if Z.N2 > 0:
                    X += _inner(state2, other2)
        by_state *= to_state
        if FAR:
            tl.store(sums.state + here + rows, by_state, mask=inside)
        elif READERS:
            tl.store(sums.X + (batch * Z.h + head) * spans + chunk // 2, X * across * through(d, DOCUMENTS))
        if READERS:
            tl.store(sums.rows + here + rows, by_row + by_far + by_state, mask=inside)
        else:
            tl.store(sums.columns + here + rows, by_row, mask=inside)
            tl.store(sums.w + here + rows, by_far + by_state, mask=inside)

    ngroups: tl.constexpr = Z.h // Z.R
    narrow_pairs = dpairs.to(narrow)
    token = (tl.cast(part, tl.int64) * tl.num_programs(2) + batch) * seqlen + start
    dk += (token * ngroups + group) * Z.n
    acc1 = dot(narrow_pairs, other_pair[0], acc1, Z)
    if FAR:
        narrow_far = dfar.to(narrow)
        acc1 = dot(narrow_far, far_pair[0], acc1, Z)
    store_tile(dk, rows, seqlen - start, tl.arange(0, Z.N1), Z.n, ngroups * Z.n, acc1)
    if Z.N2 > 0:
        acc2 = dot(narrow_pairs, other_pair[1], acc2, Z)
        if FAR:
            acc2 = dot(narrow_far, far_pair[1], acc2, Z)
        store_tile(dk, rows, seqlen - start, tl.arange(0, Z.N2) + Z.N1, Z.n, ngroups * Z.n, acc2)


@triton.jit
def _inner(a, b):
    return tl.sum(tl.sum(a.to(tl.float32) * b.to(tl.float32), axis=1), axis=0)
