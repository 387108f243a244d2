"""Causal depthwise convolution over time with SiLU (in the mixer of x, B and C): a token sees the last K inputs.

y_t = silu(bias + Σ_{k<K} weight_k x_{t-(K-1)+k})        x_t = 0 before the sequence (or from `initial_state`)

The forward and the backward kernel each pass over the tokens once (the plain torch forms: `conv1d_torch.py`):

pre_t = bias + Σ_k weight_k x_{t-(K-1)+k}            y_t = silu(pre_t)            (k < K, x of earlier documents 0)
    g_t   = dy_t silu'(pre_t)                            dx_s = Σ_k weight_k g_{s+(K-1)-k}     (same document as s)
    dweight_k = Σ_t g_t x_{t-(K-1)+k}                    dbias = Σ_t g_t

The channels may be split into pieces, each with its own y and dy, so that dx, dB and dC of the scan need not be
concatenated into one dy.

Grid (channel tiles * token tiles, b). A program owns C channels of `tokens` consecutive tokens of one sequence and
walks them in order, the last K - 1 inputs in registers, so that each element is loaded once and not K times; only the
K - 1 tokens on either side of its own are loaded by two programs. A change of seq_idx clears these registers.

The backward recomputes pre and holds the unfinished dx of the last K - 1 tokens in registers: token t adds its share
to all K of them, and the oldest is then complete. The initial state is K - 1 more tokens before token 0, whose
gradients the programs of the first token tile compute in the same loop. dweight and dbias are written as one row of
partial sums per token tile, which `sum_rows` adds up.

Bytes per token, 16-bit input: forward 4 d, backward 6 d + 8 (K + 1) d / tokens. Only inputs are kept for the backward.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from mamba2.ops.backend import choose_backend
from mamba2.ops.conv1d_torch import (
    causal_conv1d_blocked,
    causal_conv1d_reference,
    causal_conv1d_step_reference,
    differentiable,
    document_last_inputs,
    empty_pieces,
    last_inputs,
)
from mamba2.ops.documents import document_numbers
from mamba2.ops.gradient import empty_gradients
from mamba2.ops.kernel import (
    aligned,
    alignment,
    constant,
    multiprocessors,
    require_kernel_tensors,
    silu,
    silu_slope,
    strided,
    sum_rows,
)
from mamba2.ops.language import tl, triton

MAX_WIDTH = 8  # of the kernels, which hold the window and its gradients in registers

# Channels of a program: 4 per thread of two warps, loads of 8 bytes each in 16-bit input.
CHANNELS = 256


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    activation: bool = True,
    return_final_state: bool = False,
    splits: tuple[int, ...] | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor | tuple:
    """Causal depthwise convolution of width K and, with `activation`, SiLU; sums in float32.

    Arguments (b batch, l seqlen, d channels; any strides):
        x: (b, l, d), floating.
        weight: (d, K), the last column multiplies the current token.
        bias: (d,) or None.
        seq_idx: (b, l) integers or None. A token sees nothing from before the last change of value.
        initial_state: (b, K - 1, d), the inputs before the first token, or None for zeros.
        return_final_state: also return the last K - 1 inputs (b, K - 1, d), those of earlier documents set to zero, so
            that passing them to the next segment as `initial_state` equals one long sequence.
        splits: None, or widths that sum to d: y is then a tuple of pieces (b, l, width). Unlike after
            `y.split(splits, -1)`, the backward takes the gradients of the pieces without concatenating them.
        cu_seqlens: (documents + 1,) integers or None, in place of `seq_idx` and without `initial_state`, as in
            `mamba2.ops.ssd`; the last inputs are then those of each document, (documents, K - 1, d).

    Returns y (b, l, d) in x's dtype, or the tuple of its pieces; with `return_final_state` a pair of that and the last
    inputs. Follows `causal_conv1d_fn` of the causal-conv1d package, channels last.
    Raises ValueError naming the argument whose shape does not fit, or dtype where the backend is Triton.
    """
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x must have shape (batch, seqlen, channels) with no empty dimension, not {tuple(x.shape)}")
    b, l, d = x.shape
    if weight.dim() != 2 or weight.shape[0] != d or weight.shape[1] < 1:
        raise ValueError(f"weight must have shape ({d}, width), not {tuple(weight.shape)}")
    width = weight.shape[1]
    for name, tensor, shape in (
        ("bias", bias, (d,)),
        ("seq_idx", seq_idx, (b, l)),
        ("initial_state", initial_state, (b, width - 1, d)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")
    if cu_seqlens is not None:
        seq_idx = document_numbers(cu_seqlens, x, seq_idx=seq_idx, initial_state=initial_state)
    pieces = (d,) if splits is None else tuple(splits)
    if sum(pieces) != d or min(pieces) < 1:
        raise ValueError(f"splits must be positive widths that sum to the {d} channels of x, not {pieces}")
    backend = choose_backend(x, tuple(IMPLEMENTATIONS), kernel_fits=width <= MAX_WIDTH)
    implementation = IMPLEMENTATIONS[backend]
    ys = implementation(x, weight, bias, seq_idx, initial_state, activation, pieces)
    y = ys[0] if splits is None else tuple(ys)
    if not return_final_state:
        return y
    if cu_seqlens is not None:
        return y, document_last_inputs(x, width - 1, cu_seqlens)
    return y, last_inputs(x, width - 1, initial_state, seq_idx)


@torch.no_grad()
def causal_conv1d_step(
    window: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: bool = True,
) -> torch.Tensor:
    """Shift `window` by one token, in place, and return the convolution's output for it, (b, d) in x's dtype.

    Arguments: window (b, K - 1, d), the last inputs, as `causal_conv1d` returns them; x (b, d); weight (d, K); bias
    (d,) or None. Runs as a few torch operations on every device.

    Raises ValueError naming the argument whose shape does not fit.
    """
    b, d = x.shape
    if weight.dim() != 2 or weight.shape[0] != d:
        raise ValueError(f"weight must have shape ({d}, width), not {tuple(weight.shape)}")
    if tuple(window.shape) != (b, weight.shape[1] - 1, d):
        raise ValueError(f"window must have shape {(b, weight.shape[1] - 1, d)}, not {tuple(window.shape)}")
    return causal_conv1d_step_reference(window, x, weight, bias, activation)


class Tiling(NamedTuple):
    """Compile-time parameters of a kernel; every field is a `tl.constexpr`."""

    WIDTHS: Any  # channels of each piece
    K: Any  # taps
    C: Any  # channels of a program
    ROWS: Any  # tokens that are loaded together
    ALIGN: Any  # divides the strides of x and of the pieces


@triton.constexpr_function
def _tiles(widths, pieces, C):
    """Channel tiles of the first `pieces` pieces; a tile lies in one piece."""
    return sum(-(-width // C) for width in widths[:pieces])


@triton.constexpr_function
def _channels(widths, pieces):
    return sum(widths[:pieces])


@triton.constexpr_function
def _count(widths):
    return len(widths)


@triton.jit
def _piece(pieces, batch, Z):
    """For the piece that contains the program's tile: pointers to the tile's channels of token 0 (C), the stride of
    tokens, the channels' indices in d, and the mask of those inside the piece."""
    tile = tl.program_id(0) % _tiles(Z.WIDTHS, _count(Z.WIDTHS), Z.C)
    tensor = pieces[0].pointer
    batch_stride = aligned(pieces[0].strides[0], Z.ALIGN)
    stride = aligned(pieces[0].strides[1], Z.ALIGN)
    channel_stride = pieces[0].strides[2]
    width = Z.WIDTHS[0]
    start = 0
    tiles = 0
    for i in tl.static_range(1, _count(Z.WIDTHS)):
        here = tile >= _tiles(Z.WIDTHS, i, Z.C)
        tensor = tl.where(here, pieces[i].pointer, tensor)
        batch_stride = tl.where(here, aligned(pieces[i].strides[0], Z.ALIGN), batch_stride)
        stride = tl.where(here, aligned(pieces[i].strides[1], Z.ALIGN), stride)
        channel_stride = tl.where(here, pieces[i].strides[2], channel_stride)
        width = tl.where(here, Z.WIDTHS[i], width)
        start = tl.where(here, _channels(Z.WIDTHS, i), start)
        tiles = tl.where(here, _tiles(Z.WIDTHS, i, Z.C), tiles)
    inside = ((tile - tiles) * Z.C + tl.arange(0, Z.C)).to(tl.int64)
    return tensor + batch * batch_stride + inside * channel_stride, stride, start + inside, inside < width


@triton.jit
def _begin(x, weight, bias, batch, columns, mask, Z):
    """Pointers to x's channels of token 0 (C), the stride of tokens, the K columns of weight, the bias."""
    stride = aligned(x.strides[1], Z.ALIGN)
    here = x.pointer + batch * aligned(x.strides[0], Z.ALIGN) + columns * x.strides[2]
    taps = ()
    for k in tl.static_range(Z.K):
        pointers = weight.pointer + columns * weight.strides[0] + k * weight.strides[1]
        taps += (tl.load(pointers, mask=mask, other=0.0).to(tl.float32),)
    offset = tl.zeros((Z.C,), dtype=tl.float32)
    if bias is not None:
        offset = tl.load(bias.pointer + columns * bias.strides[0], mask=mask, other=0.0).to(tl.float32)
    return here, stride, taps, offset


@triton.jit
def _zeros(COUNT: tl.constexpr, Z):
    result = ()
    for _ in tl.static_range(COUNT):
        result += (tl.zeros((Z.C,), dtype=tl.float32),)
    return result


@triton.jit
def _cleared(window, change, COUNT: tl.constexpr):
    """The window, set to zero where a document begins (`change`). By `where`, so that no inf or NaN gets through."""
    result = ()
    for i in tl.static_range(COUNT):
        result += (tl.where(change, 0.0, window[i]),)
    return result


@triton.jit
def _load_rows(here, first, stride, end, mask, Z):
    """ROWS tokens from `first` on, zero from `end` on. All are loaded before one is used, so that the loads overlap."""
    result = ()
    for i in tl.static_range(Z.ROWS):
        token = first + i
        result += (tl.load(here + token.to(tl.int64) * stride, mask=mask & (token < end), other=0.0),)
    return result


@triton.jit
def _changes(seq_idx, batch, first, end, ROWS: tl.constexpr):
    """Whether each of ROWS tokens begins a document; token 0 does not, nor does anything from `end` on."""
    result = ()
    for i in tl.static_range(ROWS):
        token = first + i
        inside = (token > 0) & (token < end)
        pointer = seq_idx.pointer + batch * seq_idx.strides[0] + token.to(tl.int64) * seq_idx.strides[1]
        here = tl.load(pointer, mask=inside, other=0)
        before = tl.load(pointer - seq_idx.strides[1], mask=inside, other=0)
        result += (inside & (here != before),)
    return result


@triton.jit
def _window(given, batch, row, columns):
    """Pointers to a row of a window (b, K - 1, d)."""
    return given.pointer + batch * given.strides[0] + row * given.strides[1] + columns * given.strides[2]


@triton.jit
def _load_before(here, x_stride, initial, seq_idx, batch, columns, start, mask, Z):
    """The K - 1 inputs before the program's first token, zero where they are of earlier documents, and the age of the
    last one: how many tokens of its document precede it, or K or more if the document begins before these inputs."""
    window = ()
    age = start * 0 + Z.K
    for i in tl.static_range(Z.K - 1):
        token = start - (Z.K - 1) + i
        row = tl.load(here + token.to(tl.int64) * x_stride, mask=mask & (token >= 0), other=0.0)
        if initial is not None:
            given = tl.load(_window(initial, batch, i, columns), mask=mask & (token < 0), other=0.0)
            row = tl.where(token < 0, given.to(row.dtype), row)
        if seq_idx is not None:
            change = _changes(seq_idx, batch, token, start, 1)[0]
            window = _cleared(window, change, i)
            age = tl.where(change, 0, age + 1)
        window += (row.to(tl.float32),)
    return window, age


@triton.jit
def _convolve(seen, taps, bias, Z):
    total = bias
    for k in tl.static_range(Z.K):
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
    seqlen,
    tokens,
    Z,
    ACTIVATION: tl.constexpr,
):
    """Grid (channel tiles * token tiles, b). Writes y for the program's tokens."""
    batch = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) // _tiles(Z.WIDTHS, _count(Z.WIDTHS), Z.C) * tokens
    y, y_stride, columns, mask = _piece(ys, batch, Z)
    here, x_stride, taps, offset = _begin(x, weight, bias, batch, columns, mask, Z)
    window, _ = _load_before(here, x_stride, initial, seq_idx, batch, columns, start, mask, Z)
    end = tl.minimum(start + tokens, seqlen)
    for first in range(start, end, Z.ROWS):
        rows = _load_rows(here, first, x_stride, end, mask, Z)
        if seq_idx is not None:
            changes = _changes(seq_idx, batch, first, end, Z.ROWS)
        for i in tl.static_range(Z.ROWS):
            token = first + i
            if seq_idx is not None:
                window = _cleared(window, changes[i], Z.K - 1)
            seen = window
            seen += (rows[i].to(tl.float32),)
            pre = _convolve(seen, taps, offset, Z)
            if ACTIVATION:
                pre = silu(pre)
            tl.store(y + token.to(tl.int64) * y_stride, pre.to(y.dtype.element_ty), mask=mask & (token < end))
            window = seen[1:]


@triton.jit
def _backward_kernel(
    dys,  # of each piece (b, l, width)
    x,  # (b, l, d)
    weight,  # (d, K)
    bias,  # (d) or None
    seq_idx,  # (b, l) or None
    initial,  # (b, K - 1, d) or None
    dx,  # out: (b, l, d), contiguous
    dinitial,  # out: (b, K - 1, d), contiguous, or None
    partial,  # out: (b, token tiles, d K + d), float32: of dweight, then of dbias (absent without a bias)
    seqlen,
    tokens,
    Z,
    ACTIVATION: tl.constexpr,
):
    """Grid (channel tiles * token tiles, b). Writes dx of the program's tokens, the first token tile also dinitial."""
    K: tl.constexpr = Z.K
    d: tl.constexpr = _channels(Z.WIDTHS, _count(Z.WIDTHS))
    batch = tl.program_id(1).to(tl.int64)
    token_tile = tl.program_id(0) // _tiles(Z.WIDTHS, _count(Z.WIDTHS), Z.C)
    start = token_tile * tokens
    dy, dy_stride, columns, mask = _piece(dys, batch, Z)
    dx += batch * seqlen * d + columns
    if initial is not None:
        dinitial += batch * ((K - 1) * d) + columns
    here, x_stride, taps, offset = _begin(x, weight, bias, batch, columns, mask, Z)
    window, age = _load_before(here, x_stride, initial, seq_idx, batch, columns, start, mask, Z)
    unfinished = _zeros(K - 1, Z)  # dx of tokens t - (K - 1) to t - 1
    dtaps = _zeros(K, Z)
    dbias = tl.zeros((Z.C,), dtype=tl.float32)
    end = tl.minimum(start + tokens, seqlen)
    # The last token's gradient is complete K - 1 tokens later, past the end of the program's own or of the sequence.
    for first in range(start, end + (K - 1), Z.ROWS):
        rows = _load_rows(here, first, x_stride, seqlen, mask, Z)
        gradients = _load_rows(dy, first, dy_stride, seqlen, mask, Z)
        if seq_idx is not None:
            changes = _changes(seq_idx, batch, first, seqlen, Z.ROWS)
        for i in tl.static_range(Z.ROWS):
            token = first + i
            if seq_idx is not None:
                window = _cleared(window, changes[i], K - 1)
                age = tl.where(changes[i], 0, age + (token < seqlen).to(tl.int32))
            seen = window
            seen += (rows[i].to(tl.float32),)
            gradient = gradients[i].to(tl.float32)
            if ACTIVATION:
                gradient *= silu_slope(_convolve(seen, taps, offset, Z))

            owned = tl.where(token < end, gradient, 0.0)
            sums = ()
            shares = ()
            for k in tl.static_range(K):
                sums += (dtaps[k] + owned * seen[k],)
                share = gradient * taps[k]
                if seq_idx is not None:
                    share = tl.where(age >= K - 1 - k, share, 0.0)
                if k < K - 1:
                    share += unfinished[k]
                shares += (share,)
            dtaps = sums
            dbias += owned
            window = seen[1:]
            unfinished = shares[1:]

            finished = token - (K - 1)
            result = shares[0]
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


def causal_conv1d_triton(
    x: torch.Tensor,  # (b, l, d)
    weight: torch.Tensor,  # (d, K)
    bias: torch.Tensor | None,  # (d,)
    seq_idx: torch.Tensor | None,  # (b, l)
    initial_state: torch.Tensor | None,  # (b, K - 1, d)
    activation: bool,
    splits: tuple[int, ...],
) -> list[torch.Tensor]:
    """See `causal_conv1d`. Returns the pieces of y.

    Forward one launch, backward two: the gradients, and the sums over programs of those of weight and bias. The pieces
    of y and their gradients are separate tensors; none are concatenated.
    """
    require_kernel_tensors(x=x, weight=weight, bias=bias, initial_state=initial_state)
    if weight.shape[1] > MAX_WIDTH:
        raise ValueError(
            f"the Triton backend takes weight of width 1 to {MAX_WIDTH}, not {weight.shape[1]}; "
            "MAMBA2_BACKEND=torch takes any"
        )
    return _convolution(x, weight, bias, seq_idx, initial_state, activation, splits)


@torch.library.custom_op("mamba2::causal_conv1d_forward", mutates_args=())
def _forward_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    initial: torch.Tensor | None,
    activation: bool,
    splits: Sequence[int],
) -> list[torch.Tensor]:
    """The pieces of y."""
    ys = empty_pieces(x, splits)
    grid, tokens, Z, warps = _launch(x, weight, ys, seq_idx, initial, backward=False)
    with torch.cuda.device_of(x):
        _forward_kernel[grid](
            *map(strided, (x, weight, bias, seq_idx, initial)),
            tuple(map(strided, ys)),
            x.shape[1],
            tokens,
            Z,
            ACTIVATION=activation,
            num_warps=warps,
        )
    return ys


@torch.library.custom_op("mamba2::causal_conv1d_backward", mutates_args=())
def _backward_op(
    dys: Sequence[torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    initial: torch.Tensor | None,
    activation: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight, bias and initial; empty for those not given."""
    grads = dx, dweight, dbias, dinitial = empty_gradients(x, weight, bias, initial)
    b, l, d = x.shape
    grid, tokens, Z, warps = _launch(x, weight, dys, seq_idx, initial, backward=True)
    columns = weight.numel() + (0 if bias is None else d)
    partial = x.new_empty(b * triton.cdiv(l, tokens), columns, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _backward_kernel[grid](
            tuple(map(strided, dys)),
            *map(strided, (x, weight, bias, seq_idx, initial)),
            dx,
            None if initial is None else dinitial,
            partial,
            l,
            tokens,
            Z,
            ACTIVATION=activation,
            num_warps=warps,
        )
        sum_rows(partial, dweight, None if bias is None else dbias)
    return grads


_convolution = differentiable(_forward_op, _backward_op)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    pieces: Sequence[torch.Tensor],
    seq_idx: torch.Tensor | None,
    initial: torch.Tensor | None,
    backward: bool,
) -> tuple[tuple[int, int], int, Tiling, int]:
    """Grid, tokens per program, compile-time values and warps; `pieces` are what is read or written beside x.

    Tokens per program: as many as leave 16 programs of two warps per multiprocessor, at least 32 and at most 256. More
    tokens mean fewer partial sums and fewer tokens loaded by two programs; at 32 these cost a fifth.
    """
    b, l, d = x.shape
    width = weight.shape[1]
    channels = min(CHANNELS, triton.next_power_of_2(d))
    widths = tuple(piece.shape[2] for piece in pieces)
    tiles = sum(triton.cdiv(width, channels) for width in widths)
    share = b * l * tiles // (16 * multiprocessors(x.device))
    tokens = min(256, triton.next_power_of_2(max(32, share)))
    extras = (seq_idx is not None) + (initial is not None)
    # More rows are more loads in flight, and more scalar addresses and masks: some targets spill them.
    rows = 2 if extras == 2 else 4
    # Four channels per thread at 128 registers or fewer. Each tap costs the backward four registers per channel,
    # documents or windows as much again: two channels per thread then.
    warps = 2 if width <= 4 and not (backward and extras) else 4
    Z = Tiling(*map(constant, (widths, width, channels, rows, alignment(x, *pieces))))
    return (tiles * triton.cdiv(l, tokens), b), tokens, Z, warps


IMPLEMENTATIONS = {
    "reference": causal_conv1d_reference,
    "torch": causal_conv1d_blocked,
    "triton": causal_conv1d_triton,
}
