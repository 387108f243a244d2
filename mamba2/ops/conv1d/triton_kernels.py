"""Causal depthwise convolution, forward and backward, each one walk over the tokens.

    pre_t = bias + Σ_k weight_k x_{t-(K-1)+k}            y_t = silu(pre_t)            (k < K, x of earlier documents 0)
    g_t   = dy_t silu'(pre_t)                            dx_s = Σ_k weight_k g_{s+(K-1)-k}     (same document as s)
    dweight_k = Σ_t g_t x_{t-(K-1)+k}                    dbias = Σ_t g_t

The channels may be cut into pieces, each with a y and a dy of its own, so that nobody has to join dx, dB and dC of the
scan into one dy first.

Grid (channel tiles * token tiles, b). A program owns C channels of `tokens` consecutive tokens of one sequence and
walks them in order, the last K - 1 inputs in registers, so that each element is loaded once and not K times; only the
K - 1 tokens on either side of its own are loaded by two programs. A change of seq_idx clears these registers.

The backward recomputes pre and holds the unfinished dx of the last K - 1 tokens in registers: token t adds its share
to all K of them, and the oldest is then complete. The window before the sequence is K - 1 tokens more, those before
token 0: the first program finishes their gradients like any other. dweight and dbias leave as one row of partial sums
per program, which `triton_reduce` adds up.

Bytes per token, 16-bit input: forward 4 d, backward 6 d + 8 (K + 1) d / tokens. Nothing is kept between the two.
"""

import triton
import triton.language as tl

from mamba2.ops.triton_math import aligned, silu, silu_slope


@triton.constexpr_function
def _tiles(widths, pieces, C):
    """Channel tiles of the first `pieces` pieces; a tile lies in one piece."""
    return sum(-(-width // C) for width in widths[:pieces])


@triton.constexpr_function
def _channels(widths, pieces):
    return sum(widths[:pieces])


@triton.jit
def _piece(tensors, strides, tile, WIDTHS: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr):
    """Of the piece that the tile lies in: its tensor, the strides (batch, token, channel), its first channel, the
    tile's channels inside the piece (C), and which of them exist."""
    tensor = tensors[0]
    batch_stride = aligned(strides[0][0], ALIGN)
    stride = aligned(strides[0][1], ALIGN)
    channel_stride = strides[0][2]
    width = WIDTHS[0]
    start = 0
    tiles = 0
    for i in tl.static_range(1, len(WIDTHS)):
        here = tile >= _tiles(WIDTHS, i, C)
        tensor = tl.where(here, tensors[i], tensor)
        batch_stride = tl.where(here, aligned(strides[i][0], ALIGN), batch_stride)
        stride = tl.where(here, aligned(strides[i][1], ALIGN), stride)
        channel_stride = tl.where(here, strides[i][2], channel_stride)
        width = tl.where(here, WIDTHS[i], width)
        start = tl.where(here, _channels(WIDTHS, i), start)
        tiles = tl.where(here, _tiles(WIDTHS, i, C), tiles)
    inside = ((tile - tiles) * C + tl.arange(0, C)).to(tl.int64)
    return tensor, batch_stride, stride, channel_stride, start, inside, inside < width


@triton.jit
def _zeros(COUNT: tl.constexpr, C: tl.constexpr):
    result = ()
    for _ in tl.static_range(COUNT):
        result += (tl.zeros((C,), dtype=tl.float32),)
    return result


@triton.jit
def _cleared(window, change, COUNT: tl.constexpr):
    """The window as the first token of a document sees it: empty. By `where`, so that no inf or NaN gets through."""
    result = ()
    for i in tl.static_range(COUNT):
        result += (tl.where(change, 0.0, window[i]),)
    return result


@triton.jit
def _load_weight(weight, strides, columns, mask, K: tl.constexpr):
    result = ()
    for k in tl.static_range(K):
        pointers = weight + columns * strides[0] + k * strides[1]
        result += (tl.load(pointers, mask=mask, other=0.0).to(tl.float32),)
    return result


@triton.jit
def _load_rows(x, first, stride, end, mask, ROWS: tl.constexpr):
    """ROWS tokens from `first` on, zero from `end` on. All before one is used, so that the loads travel together."""
    result = ()
    for i in tl.static_range(ROWS):
        token = first + i
        result += (tl.load(x + token.to(tl.int64) * stride, mask=mask & (token < end), other=0.0),)
    return result


@triton.jit
def _changes(seq_idx, first, stride, end, ROWS: tl.constexpr):
    """Whether each of ROWS tokens begins a document; token 0 does not, nor does anything from `end` on."""
    result = ()
    for i in tl.static_range(ROWS):
        token = first + i
        inside = (token > 0) & (token < end)
        pointer = seq_idx + token.to(tl.int64) * stride
        here = tl.load(pointer, mask=inside, other=0)
        before = tl.load(pointer - stride, mask=inside, other=0)
        result += (inside & (here != before),)
    return result


@triton.jit
def _load_before(
    x, x_stride, initial, initial_stride, seq_idx, seq_stride, start, mask, K: tl.constexpr, C: tl.constexpr
):
    """What the program's first token finds: the K - 1 inputs before it, zero where they are of earlier documents, and
    the age of the last one: how many tokens of its document precede it, or more than the window reaches."""
    window = ()
    age = start * 0 + K
    for i in tl.static_range(K - 1):
        token = start - (K - 1) + i
        row = tl.load(x + token.to(tl.int64) * x_stride, mask=mask & (token >= 0), other=0.0)
        if initial is not None:
            given = tl.load(initial + i * initial_stride, mask=mask & (token < 0), other=0.0)
            row = tl.where(token < 0, given.to(row.dtype), row)
        if seq_idx is not None:
            change = _changes(seq_idx, token, seq_stride, start, 1)[0]
            window = _cleared(window, change, i)
            age = tl.where(change, 0, age + 1)
        window += (row.to(tl.float32),)
    return window, age


@triton.jit
def _convolve(seen, taps, bias, K: tl.constexpr):
    total = bias
    for k in tl.static_range(K):
        total += seen[k] * taps[k]
    return total


@triton.jit
def _forward_kernel(
    x,  # (b, l, d)
    weight,  # (d, K)
    bias,  # (d) or None
    seq_idx,  # (b, l) or None
    initial,  # (b, K - 1, d) or None
    ys,  # out: of each piece (b, l, width)
    final,  # out: (b, K - 1, d), contiguous, or None
    ys_strides,
    x_strides,
    weight_strides,
    bias_stride,
    seq_strides,
    initial_strides,
    seqlen,
    tokens,
    WIDTHS: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Grid (channel tiles * token tiles, b). Writes y for the program's tokens; the last also the final window."""
    d: tl.constexpr = _channels(WIDTHS, len(WIDTHS))
    tiles: tl.constexpr = _tiles(WIDTHS, len(WIDTHS), C)
    tile = tl.program_id(0) % tiles
    y, y_batch_stride, y_stride, y_channel_stride, begin, inside, mask = _piece(ys, ys_strides, tile, WIDTHS, C, ALIGN)
    columns = begin + inside
    start = tl.program_id(0) // tiles * tokens
    batch = tl.program_id(1).to(tl.int64)
    y += batch * y_batch_stride + inside * y_channel_stride
    x_stride = aligned(x_strides[1], ALIGN)
    x += batch * aligned(x_strides[0], ALIGN) + columns * x_strides[2]
    if seq_idx is not None:
        seq_idx += batch * seq_strides[0]
    if initial is not None:
        initial += batch * initial_strides[0] + columns * initial_strides[2]

    taps = _load_weight(weight, weight_strides, columns, mask, K)
    offset = tl.zeros((C,), dtype=tl.float32)
    if bias is not None:
        offset = tl.load(bias + columns * bias_stride, mask=mask, other=0.0).to(tl.float32)
    window, age = _load_before(x, x_stride, initial, initial_strides[1], seq_idx, seq_strides[1], start, mask, K, C)
    end = tl.minimum(start + tokens, seqlen)
    for first in range(start, end, ROWS):
        rows = _load_rows(x, first, x_stride, end, mask, ROWS)
        if seq_idx is not None:
            changes = _changes(seq_idx, first, seq_strides[1], end, ROWS)
        for i in tl.static_range(ROWS):
            token = first + i
            if seq_idx is not None:
                window = _cleared(window, changes[i], K - 1)
                age = tl.where(changes[i], 0, age + (token < end).to(tl.int32))
            seen = window
            seen += (rows[i].to(tl.float32),)
            pre = _convolve(seen, taps, offset, K)
            if ACTIVATION:
                pre = silu(pre)
            tl.store(y + token.to(tl.int64) * y_stride, pre.to(y.dtype.element_ty), mask=mask & (token < end))
            window = seen[1:]

    if final is not None:
        final += batch * ((K - 1) * d) + columns
        last = mask & (end == seqlen)
        for i in tl.static_range(K - 1):
            token = end - (K - 1) + i
            row = tl.load(x + token.to(tl.int64) * x_stride, mask=last & (token >= 0), other=0.0)
            if initial is not None:
                # Row K - 1 + token of the window, where there are fewer tokens than it has rows.
                pointers = initial + (end + i).to(tl.int64) * initial_strides[1]
                given = tl.load(pointers, mask=last & (token < 0), other=0.0)
                row = tl.where(token < 0, given.to(row.dtype), row)
            if seq_idx is not None:
                row = tl.where(K - 2 - i <= age, row, 0.0)
            tl.store(final + i * d, row, mask=last)


@triton.jit
def _backward_kernel(
    dys,  # of each piece (b, l, width)
    dfinal,  # (b, K - 1, d) or None
    x,  # (b, l, d)
    weight,  # (d, K)
    bias,  # (d) or None
    seq_idx,  # (b, l) or None
    initial,  # (b, K - 1, d) or None
    dx,  # out: (b, l, d), contiguous
    dinitial,  # out: (b, K - 1, d), contiguous, or None
    partial,  # out: (b, token tiles, d K + d), float32: of dweight, then of dbias (absent without a bias)
    dys_strides,
    dfinal_strides,
    x_strides,
    weight_strides,
    bias_stride,
    seq_strides,
    initial_strides,
    seqlen,
    tokens,
    WIDTHS: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Grid (channel tiles * token tiles, b). Writes dx for the program's tokens, the first also for the window."""
    d: tl.constexpr = _channels(WIDTHS, len(WIDTHS))
    tiles: tl.constexpr = _tiles(WIDTHS, len(WIDTHS), C)
    tile = tl.program_id(0) % tiles
    dy, dy_batch_stride, dy_stride, dy_channel_stride, begin, inside, mask = _piece(
        dys, dys_strides, tile, WIDTHS, C, ALIGN
    )
    columns = begin + inside
    token_tile = tl.program_id(0) // tiles
    start = token_tile * tokens
    batch = tl.program_id(1).to(tl.int64)
    x_stride = aligned(x_strides[1], ALIGN)
    x += batch * aligned(x_strides[0], ALIGN) + columns * x_strides[2]
    dy += batch * dy_batch_stride + inside * dy_channel_stride
    dx += batch * seqlen * d + columns
    if seq_idx is not None:
        seq_idx += batch * seq_strides[0]
    if initial is not None:
        initial += batch * initial_strides[0] + columns * initial_strides[2]
        dinitial += batch * ((K - 1) * d) + columns
    if dfinal is not None:
        dfinal += batch * dfinal_strides[0] + columns * dfinal_strides[2]

    taps = _load_weight(weight, weight_strides, columns, mask, K)
    offset = tl.zeros((C,), dtype=tl.float32)
    if bias is not None:
        offset = tl.load(bias + columns * bias_stride, mask=mask, other=0.0).to(tl.float32)
    window, age = _load_before(x, x_stride, initial, initial_strides[1], seq_idx, seq_strides[1], start, mask, K, C)
    unfinished = _zeros(K - 1, C)  # dx of tokens t - (K - 1) to t - 1
    dtaps = _zeros(K, C)
    dbias = tl.zeros((C,), dtype=tl.float32)
    end = tl.minimum(start + tokens, seqlen)
    # The last token's gradient is complete K - 1 tokens later, past the end of the program's own or of the sequence.
    for first in range(start, end + (K - 1), ROWS):
        rows = _load_rows(x, first, x_stride, seqlen, mask, ROWS)
        gradients = _load_rows(dy, first, dy_stride, seqlen, mask, ROWS)
        if seq_idx is not None:
            changes = _changes(seq_idx, first, seq_strides[1], seqlen, ROWS)
        for i in tl.static_range(ROWS):
            token = first + i
            if seq_idx is not None:
                window = _cleared(window, changes[i], K - 1)
                age = tl.where(changes[i], 0, age + (token < seqlen).to(tl.int32))
            seen = window
            seen += (rows[i].to(tl.float32),)
            gradient = gradients[i].to(tl.float32)
            if ACTIVATION:
                gradient *= silu_slope(_convolve(seen, taps, offset, K))

            owned = tl.where(token < end, gradient, 0.0)
            sums = ()
            shares = ()
            for k in tl.static_range(K):
                sums += (dtaps[k] + owned * seen[k],)
                share = gradient * taps[k]
                if seq_idx is not None:
                    share = tl.where(K - 1 - k <= age, share, 0.0)
                if k < K - 1:
                    share += unfinished[k]
                shares += (share,)
            dtaps = sums
            dbias += owned
            window = seen[1:]
            unfinished = shares[1:]

            finished = token - (K - 1)
            result = shares[0]
            if dfinal is not None:
                # Row of the final window that this token is, if `finished` is among its K - 1 tokens.
                row = finished - (seqlen - (K - 1))
                among = (row >= 0) & (row < K - 1)
                if seq_idx is not None:
                    among = among & (K - 2 - row <= age)
                more = tl.load(dfinal + row.to(tl.int64) * dfinal_strides[1], mask=mask & among, other=0.0)
                result += more.to(tl.float32)
            mine = (finished >= start) & (finished < end)
            tl.store(dx + finished.to(tl.int64) * d, result.to(dx.dtype.element_ty), mask=mask & mine)
            if initial is not None:
                # The window's K - 1 rows are the tokens before token 0.
                before = dinitial + token.to(tl.int64) * d
                tl.store(before, result.to(dinitial.dtype.element_ty), mask=mask & (finished < 0))

    width: tl.constexpr = d * K if bias is None else d * K + d
    partial += (batch * tl.cdiv(seqlen, tokens) + token_tile) * width
    for k in tl.static_range(K):
        tl.store(partial + columns * K + k, dtaps[k], mask=mask)
    if bias is not None:
        tl.store(partial + d * K + columns, dbias, mask=mask)
