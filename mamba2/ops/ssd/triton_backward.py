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

A program owns a step of one group and loops over the group's heads, so that dB, dC and dCB are summed in registers
and leave once. Matrices over pairs are held with j in rows: every product of the loop over heads then takes them as
they are. S and R are read where a span was kept (`triton_states`), and brought to this step by at most span / q - 1
steps.

Bytes per token, 16-bit input, span s: x, dout, dx 6 h p; B, C, dB, dC 8 g n; dt, ddt 4 h or 8 h; S and R 4 h p n / s.
"""

import triton
import triton.language as tl

from mamba2.ops.ssd.triton_common import (
    advance,
    clamp_dt,
    decays,
    documents,
    dot,
    gated,
    load_dt,
    load_state,
    load_tile,
    store_tile,
    tile_rows,
)
from mamba2.ops.triton_math import LOG2E, sigmoid, silu_slope


@triton.jit
def _gradient_kernel(
    x,  # (b, l, h, p)
    dt,  # (b, l, h)
    A,  # (h)
    B,  # (b, l, g, n)
    C,  # (b, l, g, n)
    D,  # (h) or (h, p), or None
    z,  # (b, l, h, p) or None
    bias,  # (h) or None
    seq_idx,  # (b, l) or None
    dout,  # (b, l, h, p)
    kept_S,  # states entering each span: (b, spans, h, n, p)
    kept_R,  # gradients of the states leaving each span: (b, spans, h, n, p)
    dx,  # out: (b, l, h, p); this and all below contiguous
    ddt,  # out: (b, l, h)
    dB,  # out: (b, l, g, n)
    dC,  # out: (b, l, g, n)
    dz,  # out: (b, l, h, p) or None
    partial,  # out: per step (b, steps, 2 h + size of D), float32: dA, d(dt_bias), dD
    x_strides,
    dt_strides,
    B_strides,
    C_strides,
    D_strides,
    z_strides,
    seq_strides,
    dout_strides,
    seqlen,
    ngroups,
    spans,
    low,
    high,
    p: tl.constexpr,
    n: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    SPAN_STEPS: tl.constexpr,
    Q: tl.constexpr,
    P_TILE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Grid (steps, g, b)."""
    step = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    steps = tl.cdiv(seqlen, Q)
    nheads = ngroups * HEADS_PER_GROUP
    start = step * Q
    offset = start.to(tl.int64)
    left = seqlen - start
    rows = tile_rows(Q, WIDE)
    columns1 = tl.arange(0, N1)
    columns2 = N1 + tl.arange(0, N2 if N2 > 0 else 16)
    narrow = x.dtype.element_ty

    x += batch * x_strides[0]
    dt += batch * dt_strides[0]
    B += batch * B_strides[0] + group * B_strides[2]
    C += batch * C_strides[0] + group * C_strides[2]
    dout += batch * dout_strides[0]
    if z is not None:
        z += batch * z_strides[0]
    if seq_idx is not None:
        seq_idx += batch * seq_strides[0]
    token = batch * seqlen + offset  # of the step's first, in the contiguous outputs
    span = step // SPAN_STEPS
    kept = (batch * spans + span) * nheads * (n * p)
    width = 2 * nheads  # of a row of `partial`
    if D is not None:
        width += nheads * p if D_PER_CHANNEL else nheads
    partial += (batch * steps + step) * width

    B1 = load_tile(B + offset * B_strides[1], rows, left, columns1, n, B_strides[1], B_strides[3])
    C1 = load_tile(C + offset * C_strides[1], rows, left, columns1, n, C_strides[1], C_strides[3])
    BC = dot(B1, tl.trans(C1), None, PRECISION)  # (j, i)
    dB1 = tl.zeros((Q, N1), dtype=tl.float32)
    dC1 = tl.zeros((Q, N1), dtype=tl.float32)
    if N2 > 0:
        B2 = load_tile(B + offset * B_strides[1], rows, left, columns2, n, B_strides[1], B_strides[3])
        C2 = load_tile(C + offset * C_strides[1], rows, left, columns2, n, C_strides[1], C_strides[3])
        BC = dot(B2, tl.trans(C2), BC, PRECISION)
        dB2 = tl.zeros((Q, N2), dtype=tl.float32)
        dC2 = tl.zeros((Q, N2), dtype=tl.float32)
    dBC = tl.zeros((Q, Q), dtype=tl.float32)

    seq_here = seq_idx + offset * seq_strides[1] if seq_idx is not None else None
    document = documents(seq_here, seq_strides[1], rows, start, left)
    visible = rows[:, None] <= rows[None, :]
    if seq_idx is not None:
        visible = visible & (document[:, None] == document[None, :])

    for r in range(0, HEADS_PER_GROUP):
        head = group * HEADS_PER_GROUP + r
        decay_rate = tl.load(A + head).to(tl.float32)
        rate = decay_rate * LOG2E
        dt_head = dt + head * dt_strides[2]
        raw, activated = load_dt(dt_head + offset * dt_strides[1], dt_strides[1], rows, left, bias, head, SOFTPLUS)
        dt_step = clamp_dt(activated, rows, left, low, high)
        cs = tl.cumsum(dt_step * rate, axis=0)
        into, out, through = decays(cs, document, rows, seq_idx is not None)
        E = tl.where(visible, tl.exp2(tl.minimum(cs[None, :] - cs[:, None], 0.0)), 0.0)  # (j, i)
        weights = (BC * E).to(narrow)

        pairs = tl.zeros((Q, Q), dtype=tl.float32)  # dout_i·x_j, (j, i)
        ux = tl.zeros((Q,), dtype=tl.float32)
        s = tl.zeros((Q,), dtype=tl.float32)
        v = tl.zeros((Q,), dtype=tl.float32)
        RS = 0.0
        dD_sum = 0.0
        for tile in tl.static_range((p + P_TILE - 1) // P_TILE):
            columns = tile * P_TILE + tl.arange(0, P_TILE)
            x_head = x + head * x_strides[2]
            dout_head = dout + head * dout_strides[2]
            z_head = z + head * z_strides[2] if z is not None else None
            kept_here = kept + head * (n * p)
            # S from the start of the span to this step, R from its end.
            S1 = load_state(kept_S + kept_here, columns, p, n, 0, N1).to(tl.float32)
            R1 = load_state(kept_R + kept_here, columns, p, n, 0, N1).to(tl.float32)
            S2 = S1
            R2 = R1
            if N2 > 0:
                S2 = load_state(kept_S + kept_here, columns, p, n, N1, N2).to(tl.float32)
                R2 = load_state(kept_R + kept_here, columns, p, n, N1, N2).to(tl.float32)
            if SPAN_STEPS > 1:
                for other in range(span * SPAN_STEPS, step):
                    begin = other * Q
                    far = begin.to(tl.int64)
                    S1, S2, _ = advance(
                        S1,
                        S2,
                        x_head + far * x_strides[1],
                        x_strides,
                        None,
                        z_strides,
                        B + far * B_strides[1],
                        B_strides,
                        dt_head + far * dt_strides[1],
                        dt_strides[1],
                        seq_idx + far * seq_strides[1] if seq_idx is not None else None,
                        seq_strides[1],
                        bias,
                        head,
                        rate,
                        begin,
                        seqlen - begin,
                        columns,
                        low,
                        high,
                        p,
                        n,
                        Q,
                        N1,
                        N2,
                        SOFTPLUS,
                        False,
                        PRECISION,
                        WIDE,
                    )
                last = tl.minimum(span * SPAN_STEPS + SPAN_STEPS, steps) - 1
                for other in range(0, last - step):
                    begin = (last - other) * Q
                    far = begin.to(tl.int64)
                    R1, R2, _ = advance(
                        R1,
                        R2,
                        dout_head + far * dout_strides[1],
                        dout_strides,
                        z_head + far * z_strides[1] if z is not None else None,
                        z_strides,
                        C + far * C_strides[1],
                        C_strides,
                        dt_head + far * dt_strides[1],
                        dt_strides[1],
                        seq_idx + far * seq_strides[1] if seq_idx is not None else None,
                        seq_strides[1],
                        bias,
                        head,
                        rate,
                        begin,
                        seqlen - begin,
                        columns,
                        low,
                        high,
                        p,
                        n,
                        Q,
                        N1,
                        N2,
                        SOFTPLUS,
                        True,
                        PRECISION,
                        WIDE,
                    )
            RS += tl.sum(R1 * S1)
            S1 = S1.to(narrow)
            R1 = R1.to(narrow)
            if N2 > 0:
                RS += tl.sum(R2 * S2)
                S2 = S2.to(narrow)
                R2 = R2.to(narrow)

            x_tile = load_tile(x_head + offset * x_strides[1], rows, left, columns, p, x_strides[1], x_strides[3])
            dout_tile = load_tile(
                dout_head + offset * dout_strides[1], rows, left, columns, p, dout_strides[1], dout_strides[3]
            )
            dy = dout_tile
            if z is not None:
                gate = load_tile(z_head + offset * z_strides[1], rows, left, columns, p, z_strides[1], z_strides[3])
                dy = gated(dout_tile, gate)
            pairs = dot(x_tile, tl.trans(dy), pairs, PRECISION)
            x_wide = x_tile.to(tl.float32)
            dy_wide = dy.to(tl.float32)

            # Through the state that this step leaves: R.
            u = dot(B1, R1, None, PRECISION)
            if N2 > 0:
                u = dot(B2, R2, u, PRECISION)
            u *= out[:, None]
            v += tl.sum(u * x_wide, axis=1) * dt_step
            written = (x_wide * (out * dt_step)[:, None]).to(narrow)
            dB1 = dot(written, tl.trans(R1), dB1, PRECISION)
            if N2 > 0:
                dB2 = dot(written, tl.trans(R2), dB2, PRECISION)
            # Through the tokens of this step.
            u = dot(weights, dy, u, PRECISION)
            ux += tl.sum(u * x_wide, axis=1)
            u *= dt_step[:, None]
            if D is not None:
                skip = tl.load(D + head * D_strides[0] + columns * D_strides[1], mask=columns < p, other=0.0)
                skip = skip.to(tl.float32)
                u += dy_wide * skip[None, :]
                dD_tile = tl.sum(dy_wide * x_wide, axis=0)
                if D_PER_CHANNEL:
                    tl.store(partial + 2 * nheads + head * p + columns, dD_tile, mask=columns < p)
                else:
                    dD_sum += tl.sum(dD_tile, axis=0)
            out_here = (token * nheads + head) * p
            store_tile(dx + out_here, rows, left, columns, p, nheads * p, u.to(narrow))
            # Through the state that this step reads: S.
            read = dot(C1, S1, None, PRECISION)
            if N2 > 0:
                read = dot(C2, S2, read, PRECISION)
            read *= into[:, None]
            s += tl.sum(read * dy_wide, axis=1)
            dy_into = (dy_wide * into[:, None]).to(narrow)
            dC1 = dot(dy_into, tl.trans(S1), dC1, PRECISION)
            if N2 > 0:
                dC2 = dot(dy_into, tl.trans(S2), dC2, PRECISION)
            if z is not None:
                # y before the gate, once more: nothing was kept for it.
                scores = (BC * E * dt_step[:, None]).to(narrow)
                before = dot(tl.trans(scores), x_tile, read, PRECISION)
                if D is not None:
                    before += x_wide * skip[None, :]
                gate_wide = gate.to(tl.float32)
                dgate = dout_tile.to(tl.float32) * before * silu_slope(gate_wide)
                store_tile(dz + out_here, rows, left, columns, p, nheads * p, dgate.to(narrow))

        pairs *= E * dt_step[:, None]
        dBC += pairs
        W = tl.where(rows[:, None] == rows[None, :], 0.0, pairs * BC)
        later = tl.cumsum(tl.sum(W, axis=0) - tl.sum(W, axis=1) + s, axis=0, reverse=True)
        da = later + tl.cumsum(v, axis=0) - v + through * RS
        ddt_step = tl.where(rows < left, ux + da * decay_rate, 0.0)
        ddt_step = tl.where((activated >= low) & (activated <= high), ddt_step, 0.0)
        if SOFTPLUS:
            ddt_step *= sigmoid(raw)
        tl.store(ddt + (token + rows) * nheads + head, ddt_step.to(ddt.dtype.element_ty), mask=rows < left)
        tl.store(partial + head, tl.sum(dt_step * da, axis=0))
        tl.store(partial + nheads + head, tl.sum(ddt_step, axis=0))
        if D is not None and not D_PER_CHANNEL:
            tl.store(partial + 2 * nheads + head, dD_sum)

    dBC_narrow = dBC.to(narrow)
    group_here = (token * ngroups + group) * n
    dB1 = dot(dBC_narrow, C1, dB1, PRECISION)
    dC1 = dot(tl.trans(dBC_narrow), B1, dC1, PRECISION)
    store_tile(dB + group_here, rows, left, columns1, n, ngroups * n, dB1.to(narrow))
    store_tile(dC + group_here, rows, left, columns1, n, ngroups * n, dC1.to(narrow))
    if N2 > 0:
        dB2 = dot(dBC_narrow, C2, dB2, PRECISION)
        dC2 = dot(tl.trans(dBC_narrow), B2, dC2, PRECISION)
        store_tile(dB + group_here, rows, left, columns2, n, ngroups * n, dB2.to(narrow))
        store_tile(dC + group_here, rows, left, columns2, n, ngroups * n, dC2.to(narrow))


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
