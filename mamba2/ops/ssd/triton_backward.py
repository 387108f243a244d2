"""SSD backward: every gradient in one visit of x, dout, B and C per step of q tokens, then one small reduction.

For a step with incoming state S and R the gradient of its outgoing state, i and j tokens of it, `cs` the inclusive
cumulative sum of dt A, CB_ij = C_i·B_j, E_ij = exp(cs_i - cs_j) for j <= i:

    u_j    = Σ_{i>=j} CB_ij E_ij dout_i + exp(cs_last - cs_j) Rᵀ B_j
    dx_j   = dt_j u_j + D dout_j       ddt_j += u_j·x_j       dD = Σ dout_j·x_j
    dCB_ij = Σ_heads (dout_i·x_j) dt_j E_ij
    dC_i   = Σ_j dCB_ij B_j + Σ_heads exp(cs_i) S dout_i
    dB_j   = Σ_i dCB_ij C_i + Σ_heads exp(cs_last - cs_j) dt_j R x_j

and for the decays a_k = dt_k A, with W_ij = (dout_i·x_j) dt_j E_ij CB_ij (j < i), s_i = exp(cs_i) dout_i·(Sᵀ C_i),
v_j = exp(cs_last - cs_j) dt_j x_j·(Rᵀ B_j):

    da_k   = Σ_{j<k<=i} W_ij + Σ_{i>=k} s_i + Σ_{j<k} v_j + exp(cs_last) <R, S>
           = Σ_{i>=k} (Σ_j W_ij - Σ_j W_ji + s_i) + Σ_{j<k} v_j + exp(cs_last) <R, S>
    ddt_k += A da_k      dA = Σ_k dt_k da_k      then through the clamp and softplus; d(dt_bias) = Σ_k d(dt_raw)_k

Every step of a group has three programs, neighbours in the grid: one for all that belongs to tokens (dx, ddt, dz, and
the sums for A, D and dt_bias), one for dB and one for dC. Each loops over the group's heads, so that sums over heads
stay in registers and leave once; what more than one of the three reads comes from L2. They are three and not one
because the accumulators of dB and dC, (q, n) each, leave no registers for the rest. S and R are read where a span was
kept (`triton_states`), and brought to this step by at most span / q - 1 steps.

Bytes per token, 16-bit input, span s: x, dout, dx 6 h p; B, C, dB, dC 8 g n; dt, ddt 4 h or 8 h; S and R 4 h p n / s.
"""

import triton
import triton.language as tl

from mamba2.ops.ssd.triton_common import (
    LOG2E,
    activate,
    advance,
    at,
    at_batch,
    dot,
    dot_n,
    gated,
    load_kept,
    load_n,
    load_tile,
    sigmoid,
    store_tile,
    tick,
)


@triton.jit
def _gradient_kernel(
    x,  # Tokens (b, l, h, p)
    B,  # Tokens (b, l, g, n)
    C,  # Tokens (b, l, g, n)
    z,  # Tokens (b, l, h, p), or None
    dout,  # Tokens (b, l, h, p)
    clock,
    D,  # PerChannel, or None
    kept_S,  # states entering each span: (b, spans, h, n, p)
    kept_R,  # gradients of the states leaving each span: (b, spans, h, n, p)
    dx,  # out: (b, l, h, p); this and all below contiguous
    ddt,  # out: (b, l, h)
    dB,  # out: (b, l, g, n)
    dC,  # out: (b, l, g, n)
    dz,  # out: (b, l, h, p), or None
    partial,  # out: per step (b, steps, 2 h + size of D), float32: dA, d(dt_bias), dD
    seqlen,
    ngroups,
    spans,
    s,  # Sizes
    D_PER_CHANNEL: tl.constexpr,
):
    """Grid (3 * steps, g, b)."""
    role = tl.program_id(0) % 3
    step = tl.program_id(0) // 3
    group = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start = step.to(tl.int64) * s.q
    nheads = ngroups * s.heads_per_group
    kept = (batch * spans + step // s.span) * nheads * (s.n * s.p)
    kept_S += kept
    kept_R += kept
    x = at(x, batch, 0)
    B = at(B, batch, group)
    C = at(C, batch, group)
    if z is not None:
        z = at(z, batch, 0)
    dout = at(dout, batch, 0)
    clock = at_batch(clock, batch)
    token = batch * seqlen + start
    group_offset = (token * ngroups + group) * s.n
    if role == 0:
        steps = tl.cdiv(seqlen, s.q)
        width = 2 * nheads
        if D is not None:
            width += nheads * s.p if D_PER_CHANNEL else nheads
        partial += (batch * steps + step) * width
        dx += token * nheads * s.p
        if z is not None:
            dz += token * nheads * s.p
        ddt += token * nheads
        _token_gradients(
            x,
            B,
            C,
            z,
            dout,
            clock,
            D,
            kept_S,
            kept_R,
            dx,
            ddt,
            dz,
            partial,
            group,
            step,
            seqlen,
            nheads,
            s,
            D_PER_CHANNEL,
        )
    elif role == 1:
        _group_gradient(x, B, C, z, dout, clock, kept_R, dB + group_offset, group, step, seqlen, ngroups, s, True)
    else:
        _group_gradient(x, B, C, z, dout, clock, kept_S, dC + group_offset, group, step, seqlen, ngroups, s, False)


@triton.jit
def _state_entering(kept_S, x, B, clock, head, step, seqlen, columns, s):
    """S before `step`: the one kept where its span begins, brought here; (n1, p_tile), (n2, p_tile), x's dtype."""
    state1, state2 = load_kept(kept_S + head * (s.n * s.p), columns, s)
    if s.span > 1:
        x_head = at(x, 0, head)
        state1 = state1.to(tl.float32)
        state2 = state2.to(tl.float32)
        for i in range(step // s.span * s.span, step):
            start = tl.cast(i, tl.int64) * s.q
            state1, state2, _ = advance(state1, state2, x_head, None, B, clock, head, start, seqlen, columns, s, False)
    return state1.to(x.data.dtype.element_ty), state2.to(x.data.dtype.element_ty)


@triton.jit
def _gradient_leaving(kept_R, dout, z, C, clock, head, step, seqlen, columns, s):
    """R after `step`: the one kept where its span ends, brought here; (n1, p_tile), (n2, p_tile), x's dtype."""
    state1, state2 = load_kept(kept_R + head * (s.n * s.p), columns, s)
    if s.span > 1:
        dout_head = at(dout, 0, head)
        z_head = at(z, 0, head) if z is not None else None
        state1 = state1.to(tl.float32)
        state2 = state2.to(tl.float32)
        last = tl.minimum(step // s.span * s.span + s.span, tl.cdiv(seqlen, s.q)) - 1
        for i in range(0, last - step):
            start = (last - i).to(tl.int64) * s.q
            state1, state2, _ = advance(
                state1, state2, dout_head, z_head, C, clock, head, start, seqlen, columns, s, True
            )
    return state1.to(C.data.dtype.element_ty), state2.to(C.data.dtype.element_ty)


@triton.jit
def _token_gradients(
    x,
    B,
    C,
    z,
    dout,
    clock,
    D,
    kept_S,
    kept_R,
    dx,
    ddt,
    dz,
    partial,
    group,
    step,
    seqlen,
    nheads,
    s,
    D_PER_CHANNEL: tl.constexpr,
):
    """dx, ddt, dz of a step and its part of dA, d(dt_bias), dD. Matrices over pairs have j in rows, i in columns."""
    start = step.to(tl.int64) * s.q
    rows = tl.arange(0, s.q)
    narrow = x.data.dtype.element_ty
    B1, B2 = load_n(B, start, seqlen, s)
    C1, C2 = load_n(C, start, seqlen, s)
    BC = dot_n(B1, B2, tl.trans(C1), tl.trans(C2), None, s)
    for r in range(0, s.heads_per_group):
        head = group * s.heads_per_group + r
        x_head = at(x, 0, head)
        dout_head = at(dout, 0, head)
        dt, cs, into, out, through, document = tick(clock, head, start, seqlen, s)
        visible = rows[:, None] <= rows[None, :]
        if clock.seq_idx is not None:
            visible = visible & (document[:, None] == document[None, :])
        E = tl.where(visible, tl.exp2(tl.minimum(cs[None, :] - cs[:, None], 0.0)), 0.0)
        weights = (BC * E).to(narrow)

        pairs = tl.zeros((s.q, s.q), dtype=tl.float32)  # x_j·dout_i
        ux = tl.zeros((s.q,), dtype=tl.float32)
        to_S = tl.zeros((s.q,), dtype=tl.float32)
        to_R = tl.zeros((s.q,), dtype=tl.float32)
        RS = 0.0
        dD = 0.0
        for tile in range(0, (s.p + s.p_tile - 1) // s.p_tile):
            columns = tile * s.p_tile + tl.arange(0, s.p_tile)
            x_tile = load_tile(x_head, start, seqlen, columns, s.p, s.q)
            dy = load_tile(dout_head, start, seqlen, columns, s.p, s.q)
            if z is not None:
                dout_wide = dy.to(tl.float32)
                gate = load_tile(at(z, 0, head), start, seqlen, columns, s.p, s.q)
                dy = gated(dy, gate)
            x_wide = x_tile.to(tl.float32)
            dy_wide = dy.to(tl.float32)
            pairs = dot(x_tile, tl.trans(dy), pairs, s)

            # u: through the state that this step leaves, then through its own tokens.
            R1, R2 = _gradient_leaving(kept_R, dout, z, C, clock, head, step, seqlen, columns, s)
            u = dot_n(B1, B2, R1, R2, None, s) * out[:, None]
            to_R += tl.sum(u * x_wide, axis=1)
            u = dot(weights, dy, u, s)
            ux += tl.sum(u * x_wide, axis=1)
            u *= dt[:, None]
            if D is not None:
                inside = columns < s.p
                skip = tl.load(D.data + head * D.head + columns * D.column, mask=inside, other=0.0).to(tl.float32)
                u += dy_wide * skip[None, :]
                dD_tile = tl.sum(dy_wide * x_wide, axis=0)
                if D_PER_CHANNEL:
                    tl.store(partial + 2 * nheads + head * s.p + columns, dD_tile, mask=inside)
                else:
                    dD += tl.sum(dD_tile, axis=0)
            store_tile(dx + head * s.p, start, seqlen, columns, s.p, nheads * s.p, u, s.q)

            # What the step reads of the state before it.
            S1, S2 = _state_entering(kept_S, x, B, clock, head, step, seqlen, columns, s)
            RS += tl.sum(R1.to(tl.float32) * S1.to(tl.float32))
            if s.n2 > 0:
                RS += tl.sum(R2.to(tl.float32) * S2.to(tl.float32))
            read = dot_n(C1, C2, S1, S2, None, s) * into[:, None]
            to_S += tl.sum(read * dy_wide, axis=1)
            if z is not None:
                # y before the gate, once more: nothing was kept for it.
                before = dot(tl.trans((BC * E * dt[:, None]).to(narrow)), x_tile, read, s)
                if D is not None:
                    before += x_wide * skip[None, :]
                gate_wide = gate.to(tl.float32)
                slope = sigmoid(gate_wide)
                slope *= 1.0 + gate_wide * (1.0 - slope)
                dgate = dout_wide * before * slope
                store_tile(dz + head * s.p, start, seqlen, columns, s.p, nheads * s.p, dgate, s.q)

        W = tl.where(rows[:, None] == rows[None, :], 0.0, pairs * E * dt[:, None] * BC)
        to_R *= dt
        da = tl.cumsum(tl.sum(W, axis=0) - tl.sum(W, axis=1) + to_S, axis=0, reverse=True)
        da += tl.cumsum(to_R, axis=0) - to_R + through * RS
        raw, activated = activate(clock, head, start, seqlen, s)
        used = (rows < seqlen - start) & (activated >= clock.low) & (activated <= clock.high)
        draw = tl.where(used, ux + da * tl.load(clock.A + head).to(tl.float32), 0.0)
        if s.softplus:
            e = tl.exp2(tl.minimum(raw, 20.0) * LOG2E)
            draw *= tl.where(raw > 20.0, 1.0, e / (1.0 + e))
        pointers = ddt + rows.to(tl.int64) * nheads + head
        tl.store(pointers, draw.to(ddt.dtype.element_ty), mask=rows < seqlen - start)
        tl.store(partial + head, tl.sum(dt * da, axis=0))
        tl.store(partial + nheads + head, tl.sum(draw, axis=0))
        if D is not None and not D_PER_CHANNEL:
            tl.store(partial + 2 * nheads + head, dD)


@triton.jit
def _group_gradient(
    x,
    B,
    C,
    z,
    dout,
    clock,
    kept,
    result,
    group,
    step,
    seqlen,
    ngroups,
    s,
    IS_B: tl.constexpr,
):
    """dB of a step (IS_B), or dC. Matrices over pairs have the tokens of the result in rows: j for dB, i for dC."""
    start = step.to(tl.int64) * s.q
    rows = tl.arange(0, s.q)
    narrow = x.data.dtype.element_ty
    acc1 = tl.zeros((s.q, s.n1), dtype=tl.float32)
    acc2 = acc1
    if s.n2 > 0:
        acc2 = tl.zeros((s.q, s.n2), dtype=tl.float32)
    dBC = tl.zeros((s.q, s.q), dtype=tl.float32)
    for r in range(0, s.heads_per_group):
        head = group * s.heads_per_group + r
        x_head = at(x, 0, head)
        dout_head = at(dout, 0, head)
        dt, cs, into, out, _, document = tick(clock, head, start, seqlen, s)
        pairs = tl.zeros((s.q, s.q), dtype=tl.float32)  # x_j·dout_i
        for tile in range(0, (s.p + s.p_tile - 1) // s.p_tile):
            columns = tile * s.p_tile + tl.arange(0, s.p_tile)
            x_tile = load_tile(x_head, start, seqlen, columns, s.p, s.q)
            dy = load_tile(dout_head, start, seqlen, columns, s.p, s.q)
            if z is not None:
                dy = gated(dy, load_tile(at(z, 0, head), start, seqlen, columns, s.p, s.q))
            if IS_B:
                pairs = dot(x_tile, tl.trans(dy), pairs, s)
                state1, state2 = _gradient_leaving(kept, dout, z, C, clock, head, step, seqlen, columns, s)
                weighted = (x_tile.to(tl.float32) * (out * dt)[:, None]).to(narrow)
            else:
                pairs = dot(dy, tl.trans(x_tile), pairs, s)
                state1, state2 = _state_entering(kept, x, B, clock, head, step, seqlen, columns, s)
                weighted = (dy.to(tl.float32) * into[:, None]).to(narrow)
            acc1 = dot(weighted, tl.trans(state1), acc1, s)
            if s.n2 > 0:
                acc2 = dot(weighted, tl.trans(state2), acc2, s)
        if IS_B:
            visible = rows[:, None] <= rows[None, :]
            pairs *= tl.exp2(tl.minimum(cs[None, :] - cs[:, None], 0.0)) * dt[:, None]
        else:
            visible = rows[:, None] >= rows[None, :]
            pairs *= tl.exp2(tl.minimum(cs[:, None] - cs[None, :], 0.0)) * dt[None, :]
        if clock.seq_idx is not None:
            visible = visible & (document[:, None] == document[None, :])
        dBC += tl.where(visible, pairs, 0.0)

    partner1, partner2 = load_n(C if IS_B else B, start, seqlen, s)
    acc1 = dot(dBC.to(narrow), partner1, acc1, s)
    store_tile(result, start, seqlen, tl.arange(0, s.n1), s.n, ngroups * s.n, acc1, s.q)
    if s.n2 > 0:
        acc2 = dot(dBC.to(narrow), partner2, acc2, s)
        store_tile(result, start, seqlen, s.n1 + tl.arange(0, s.n2), s.n, ngroups * s.n, acc2, s.q)


@triton.jit
def _reduce_kernel(
    partial,  # (count, 2 h + d), float32
    dA,  # out: (h)
    dbias,  # out: (h) or None
    dD,  # out: (d) or None
    count,
    nheads,
    d,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (columns / COLUMNS). Sums over the rows, always in the same order."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    width = 2 * nheads + d
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(0, count, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows[:, None] < count) & (columns[None, :] < width)
        block = tl.load(partial + rows.to(tl.int64)[:, None] * width + columns[None, :], mask=mask, other=0.0)
        total += tl.sum(block, axis=0)
    tl.store(dA + columns, total.to(dA.dtype.element_ty), mask=columns < nheads)
    if dbias is not None:
        mine = (columns >= nheads) & (columns < 2 * nheads)
        tl.store(dbias + columns - nheads, total.to(dbias.dtype.element_ty), mask=mine)
    if dD is not None:
        mine = (columns >= 2 * nheads) & (columns < width)
        tl.store(dD + columns - 2 * nheads, total.to(dD.dtype.element_ty), mask=mine)
