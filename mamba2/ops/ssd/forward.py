"""The walk over chunks, forward and backward, and the pass over states that lets segments be walked in parallel.

Forward, with the factors of `decay.py`, i and j tokens of a chunk, S the state before it:

    y_i = into_i S C_i + Σ_{j<=i} between_ij step_j (C_i·B_j) x_j + D x_i
    S'  = through S + Σ_j out_j step_j B_j x_jᵀ

The gradient is the same walk from the end, R the gradient of the state after the chunk, dout for x, B and C swapped:

    u_j = out_j R B_j + Σ_{i>=j} between_ij (B_j·C_i) dout_i         dx_j = step_j u_j + D dout_j
    R'  = through R + Σ_i into_i C_i dout_iᵀ

A program owns P channels of one head over a segment, a run of chunks; the state stays in registers, in float32. Where
there are too few sequences and heads to fill a device, a sequence is cut into segments: one launch walks each from a
zero state to get what it adds, `_pass_kernel` carries the states from segment to segment, and a second launch walks
each from its own state. Every head of a group recomputes C_i·B_j; its programs are neighbours and share B and C in L2.

The states that `backward.py` needs are kept once for each span of two chunks of Q tokens.

Bytes per token, 16-bit input: x, y (or dout, x, dx) 4 h p (6 h p); B, C 4 g n; steps, cs 8 h;
states kept h p n / Q; where segments are walked twice 2 h p + 2 g n + 8 h more. Bound by instructions: about 1 000
in each of four warps for a chunk of 64 tokens and 64 channels, a tenth of them matrix products.
"""

from typing import Any, NamedTuple

from mamba2.ops.language import tl, triton
from mamba2.ops.ssd.decay import between, into, load_decays, out_of, step_of, through
from mamba2.ops.ssd.tiles import (
    add_outer,
    at,
    dot,
    dot_rows,
    dot_state,
    load_head,
    load_rows,
    load_state,
    store_kept,
    store_state,
    store_tile,
    zero_state,
)


class Edges(NamedTuple):
    """States between segments, (b, segments, h, p, n)."""

    begin: Any  # View of the state that each segment begins with, or None for zeros
    end: Any  # out: the state after each segment, or after the last one walked where only that is wanted; or None
    through: Any  # out: decay through each segment (b, segments, h), float32, where all ends are wanted; or None


class Outputs(NamedTuple):
    """What a walk writes for its tokens, contiguous."""

    y: Any  # (b, l, h, p): y, or dx
    D: Any  # (h,) or None
    x: Any  # View (b, l, h, p) of x, in reverse
    sums: Any  # decay.Sums, in reverse
    plane: Any  # b h l, in reverse


@triton.jit
def _walk_kernel(
    v,  # View of x, or of dout in reverse: (b, l, h, p)
    k,  # View of B, or of C: (b, l, g, n); what is written to the state
    q,  # View of C, or of B: what reads it
    decays,
    edges,
    kept,  # out: (b, spans, h, n, p), the state before each span, in reverse the gradient of the one after; or None
    outputs,  # or None: only states are wanted
    seqlen,
    segment_chunks,
    skipped,  # segments before the first that is walked
    Z: tl.constexpr,
    REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (h * p tiles, b, segments walked)."""
    p_tiles: tl.constexpr = (Z.p + Z.P - 1) // Z.P
    DOCUMENTS: tl.constexpr = decays.first is not None
    tile = tl.program_id(0) % p_tiles
    head = (tl.program_id(0) // p_tiles).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    segment = tl.program_id(2) + skipped
    group = head // Z.R
    columns = tile * Z.P + tl.arange(0, Z.P)
    narrow = v.pointer.dtype.element_ty
    chunks = tl.cdiv(seqlen, Z.Q)
    spans = tl.cdiv(chunks, 2)
    first_chunk = segment * segment_chunks
    count = tl.minimum(segment_chunks, chunks - first_chunk)

    state1, state2 = zero_state(Z)
    if edges.begin is not None:
        state1, state2 = load_state(at(edges.begin, batch, segment, head), columns, edges.begin.strides, Z)
    skip = 0.0
    if outputs is not None:  # noqa: SIM102 (there is no D to look at otherwise)
        if outputs.D is not None:
            skip = tl.load(outputs.D + head).to(tl.float32)
    decay = 1.0
    for i in tl.range(0, count, num_stages=STAGES, disable_licm=True):
        chunk = first_chunk + (count - 1 - i if REVERSE else i)
        start = chunk * Z.Q
        d = load_decays(decays, batch, head, start, seqlen, Z)
        v_tile = load_head(v, batch, start, seqlen, head, columns, Z)
        k_pair = load_rows(k, batch, start, seqlen, group, Z)
        narrow1, narrow2 = state1.to(narrow), state2.to(narrow)
        if kept is not None:
            border = chunk % 2 == (1 if REVERSE else 0)
            if REVERSE:
                border = border | (chunk == chunks - 1)
            here = kept + ((batch * spans + chunk // 2) * Z.h + head) * (Z.n * Z.p)
            store_kept(here, narrow1, narrow2, columns, tl.where(border, Z.n, 0), Z)
        if outputs is not None:
            q_pair = load_rows(q, batch, start, seqlen, group, Z)
            rows = tl.arange(0, Z.Q)
            y = outputs.y + ((batch * seqlen + start) * Z.h + head) * Z.p
            # The order of the products decides whether they fit into the registers.
            if REVERSE:
                scores = (dot_rows(q_pair, k_pair, Z) * between(d, False, True, DOCUMENTS)).to(narrow)
                acc = dot_state(q_pair, narrow1, narrow2, Z) * out_of(d, False, DOCUMENTS)[:, None]
                acc = dot(scores, v_tile, acc, Z)
                x = load_head(outputs.x, batch, start, seqlen, head, columns, Z).to(tl.float32)
                here = outputs.plane * tl.cast(tile, tl.int64) + (batch * Z.h + head) * seqlen + start
                inside = rows < seqlen - start
                tl.store(outputs.sums.ux + here + rows, tl.sum(acc * x, axis=1), mask=inside)
                acc *= step_of(d)[:, None]
                if outputs.D is not None:
                    dout = v_tile.to(tl.float32)
                    acc += dout * skip
                    tl.store(outputs.sums.dD + here + rows, tl.sum(dout * x, axis=1), mask=inside)
            else:
                acc = dot_state(q_pair, narrow1, narrow2, Z) * into(d, DOCUMENTS)[:, None]
                scores = (dot_rows(q_pair, k_pair, Z) * between(d, True, False, DOCUMENTS)).to(narrow)
                acc = dot(scores, v_tile, acc, Z)
                if outputs.D is not None:
                    acc += v_tile.to(tl.float32) * skip
            store_tile(y, rows, seqlen - start, columns, Z.p, Z.h * Z.p, acc)
        if REVERSE:
            weight = into(d, DOCUMENTS)
        else:
            weight = out_of(d, True, DOCUMENTS)
        value = (v_tile.to(tl.float32) * weight[:, None]).to(narrow)
        factor = through(d, DOCUMENTS)
        state1, state2 = add_outer(state1, state2, k_pair, value, factor, Z)
        decay *= factor

    if edges.end is not None:
        size: tl.constexpr = Z.h * Z.n * Z.p
        if edges.through is not None:
            segments = tl.cdiv(chunks, segment_chunks)
            end = edges.end + (batch * segments + segment) * size
            tl.store(edges.through + (batch * segments + segment) * Z.h + head, decay)
            n = Z.n
        else:
            end = edges.end + batch * size
            n = tl.where(first_chunk == 0 if REVERSE else first_chunk + count == chunks, Z.n, 0)
        store_state(end + head * (Z.n * Z.p), state1, state2, columns, n, Z)


@triton.jit
def _pass_kernel(
    states,  # (b, segments, h, p n), float32: what each segment adds; out: what each begins with
    through,  # (b, segments, h)
    begin,  # View (b, 1, h, p, n) of the state that the first begins with, or None
    segments,
    Z: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (p n / BLOCK, h, b). `begin` is for the first segment, in reverse for the last."""
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < Z.p * Z.n
    state = tl.zeros((BLOCK,), dtype=tl.float32)
    if begin is not None:
        strides: tl.constexpr = begin.strides
        offsets = (element // Z.n).to(tl.int64) * strides[2] + (element % Z.n).to(tl.int64) * strides[3]
        state += tl.load(at(begin, batch, 0, head) + offsets, mask=inside, other=0.0).to(tl.float32)
    for i in range(0, segments):
        segment = batch * segments + (segments - 1 - i if REVERSE else i)
        here = states + (segment * Z.h + head) * (Z.p * Z.n) + element
        added = tl.load(here, mask=inside & (i < segments - 1), other=0.0)
        tl.store(here, state, mask=inside)
        state = state * tl.load(through + segment * Z.h + head, mask=i < segments - 1, other=0.0) + added
