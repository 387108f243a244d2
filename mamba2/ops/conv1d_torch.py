"""The convolution in plain torch: a simple form, a sum of shifted copies, and a fast one in blocks that fit in cache.

Only the inputs are kept for the backward. With a the sum before SiLU and da = dy silu'(a):

    dx_t = Σ_k weight_k da_{t+K-1-k}        dweight_k = Σ_t da_t x_{t-(K-1)+k}        dbias = Σ_t da_t

without the terms between two documents. The first K - 1 tokens, which also read the initial state, are a block of their
own; all others read x in place.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from mamba2.ops.fusion import block_elements, fusable, is_fused
from mamba2.ops.gradient import empty_gradients, register_gradient, unwatched


def causal_conv1d_reference(
    x: torch.Tensor,  # (b, l, d)
    weight: torch.Tensor,  # (d, K)
    bias: torch.Tensor | None,  # (d,)
    seq_idx: torch.Tensor | None,  # (b, l)
    initial_state: torch.Tensor | None,  # (b, K - 1, d)
    activation: bool,
    splits: tuple[int, ...],
) -> Sequence[torch.Tensor]:
    """See `mamba2.ops.causal_conv1d`. Returns the pieces of y."""
    b, l, d = x.shape
    window = weight.shape[1] - 1
    wide = torch.promote_types(x.dtype, torch.float32)
    if initial_state is None:
        initial_state = x.new_zeros(b, window, d)
    padded = torch.cat([initial_state.to(x.dtype), x], dim=1)  # (b, window + l, d)
    weight = weight.to(wide)

    if seq_idx is not None:
        changes = (seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(dim=1)
        # the window before the sequence belongs to the document of the first token
        document = F.pad(changes, (window + 1, 0))  # (b, window + l)

    y = x.to(wide) * weight[:, window]
    if bias is not None:
        y = y + bias.to(wide)
    for back in range(1, window + 1):
        start = window - back
        earlier = padded[:, start : start + l].to(wide)  # (b, l, d), the token `back` places before
        if seq_idx is not None:
            same = document[:, start : start + l] == document[:, window:]
            earlier = torch.where(same[:, :, None], earlier, torch.zeros_like(earlier))
        y = y + earlier * weight[:, start]
    if activation:
        y = F.silu(y)

    return y.to(x.dtype).split(splits, dim=-1)


def last_inputs(
    x: torch.Tensor,  # (b, l, d)
    window: int,
    initial_state: torch.Tensor | None,  # (b, window, d)
    seq_idx: torch.Tensor | None,  # (b, l)
) -> torch.Tensor:
    """The last `window` inputs of each sequence, (b, window, d), zero where they are of an earlier document."""
    b, l, d = x.shape
    kept = x.narrow(1, max(0, l - window), min(l, window))
    if l < window:
        earlier = x.new_zeros(b, window, d) if initial_state is None else initial_state.to(x.dtype)
        earlier = earlier.narrow(1, l, window - l)
        kept = torch.cat([earlier, kept], dim=1)
    if seq_idx is None:
        return kept.clone()  # a view would keep all of x in memory
    if window == 0:
        return kept
    document = F.pad((seq_idx.diff(dim=1) != 0).cumsum(dim=1), (window + 1, 0)).narrow(1, l, window)  # (b, window)
    same = document == document.narrow(1, window - 1, 1)
    return torch.where(same.unsqueeze(-1), kept, torch.zeros_like(kept))


def document_last_inputs(x: torch.Tensor, window: int, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """The last `window` inputs of each document in x (1, l, d), (documents, window, d), zero before its first token."""
    starts, ends = (cu_seqlens.narrow(0, i, len(cu_seqlens) - 1).unsqueeze(1) for i in (0, 1))
    index = ends - window + torch.arange(window, device=x.device)  # (documents, window)
    kept = x.squeeze(0).index_select(0, index.clamp(min=0).flatten()).unflatten(0, index.shape)
    return torch.where((index >= starts).unsqueeze(-1), kept, torch.zeros_like(kept))


def causal_conv1d_step_reference(
    window: torch.Tensor,  # (b, K - 1, d)
    x: torch.Tensor,  # (b, d)
    weight: torch.Tensor,  # (d, K)
    bias: torch.Tensor | None,  # (d,)
    activation: bool,
) -> torch.Tensor:
    """See `mamba2.ops.causal_conv1d_step`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    inputs = torch.cat([window.to(x.dtype), x[:, None]], dim=1)  # (b, K, d)
    window.copy_(inputs[:, 1:])
    y = (inputs.to(wide) * weight.t().to(wide)).sum(dim=1)
    if bias is not None:
        y = y + bias.to(wide)
    return (F.silu(y) if activation else y).to(x.dtype)


def causal_conv1d_blocked(
    x: torch.Tensor,  # (b, l, d)
    weight: torch.Tensor,  # (d, K)
    bias: torch.Tensor | None,  # (d,)
    seq_idx: torch.Tensor | None,  # (b, l)
    initial_state: torch.Tensor | None,  # (b, K - 1, d)
    activation: bool,
    splits: tuple[int, ...],
) -> Sequence[torch.Tensor]:
    """See `mamba2.ops.causal_conv1d`. Returns the pieces of y."""
    if torch.compiler.is_compiling():
        # The compiler fuses the readable form by itself.
        return causal_conv1d_reference(x, weight, bias, seq_idx, initial_state, activation, splits)
    return _convolution(x, weight, bias, seq_idx, initial_state, activation, splits)


class Taps:
    """Some sequences and one piece of the channels: their inputs in blocks, and which taps stay inside a document."""

    def __init__(self, x, weight, bias, seq_idx, initial, sequences: slice, channels: slice):
        wide = torch.promote_types(x.dtype, torch.float32)
        self.window = weight.shape[1] - 1
        self.x = x[sequences, :, channels]  # (s, l, c)
        self.weight = weight[channels].to(wide).t().contiguous()  # (K, c)
        self.bias = None if bias is None else bias[channels].to(wide)
        count, length, c = self.x.shape
        before = self.x.new_zeros(count, self.window, c) if initial is None else initial[sequences, :, channels]
        self.start = torch.cat([before.to(x.dtype), self.x[:, : self.window]], dim=1)  # (s, 2 (K - 1), c) or shorter
        self.reaches = None
        if seq_idx is not None:
            changes = (seq_idx[sequences, 1:] != seq_idx[sequences, :-1]).cumsum(dim=1)
            # The window before the sequence belongs to the first token's document; nothing is after the end.
            document = F.pad(F.pad(changes, (self.window + 1, 0)), (0, self.window), value=-1)
            # (s, l + window, K, 1): does tap k of token t see a token of t's own document?
            own = document[:, self.window :][:, :length]
            taps = [document[:, k : k + length] == own for k in range(self.window + 1)]
            self.reaches = F.pad(torch.stack(taps, dim=2), (0, 0, 0, self.window)).unsqueeze(-1)

    def blocks(self) -> list[slice]:
        count, length, c = self.x.shape
        size = max(self.window, 1, _cached(self.x.device) // (count * c))
        count = -(-(length - self.window) // size)
        size = -(-(length - self.window) // max(1, count))  # of nearly equal size
        first = [slice(0, min(self.window, length))] if self.window else []
        return first + [slice(i, min(i + size, length)) for i in range(self.window, length, max(1, size))]

    def inputs(self, block: slice) -> torch.Tensor:
        """Inputs of the block's tokens and of the window before, (s, window + rows, c)."""
        return self.start if block.start < self.window else self.x[:, block.start - self.window : block.stop]


def _sums(
    inputs: torch.Tensor,  # (s, K - 1 + rows, c) wide
    weight: torch.Tensor,  # (K, c) wide
    bias: torch.Tensor | None,  # (c,) wide
    reaches: torch.Tensor | None,  # (s, rows, K, 1)
) -> torch.Tensor:
    """Σ_k weight_k x_{t-(K-1)+k} + bias, (s, rows, c)."""
    window = weight.shape[0] - 1
    rows = inputs.shape[1] - window
    total = inputs[:, window:] * weight[window]
    for k in range(window):
        seen = inputs[:, k : k + rows]
        total.addcmul_(seen if reaches is None else torch.where(reaches[:, :, k], seen, 0.0), weight[k])
    return total if bias is None else total.add_(bias)


@fusable
def _convolve(
    y: torch.Tensor,  # (s, rows, c), written
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    reaches: torch.Tensor | None,
    activation: bool,
) -> None:
    sums = _sums(inputs.to(weight.dtype), weight, bias, reaches)
    y.copy_(F.silu(sums, inplace=True) if activation else sums)


@fusable
def _sum_gradients(
    da: torch.Tensor,  # (s, rows, c) wide, written
    dy: torch.Tensor,  # (s, rows, c)
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    reaches: torch.Tensor | None,
    activation: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """da, and the block's share of dweight (K, c) and dbias (c,)."""
    inputs, rows = inputs.to(weight.dtype), dy.shape[1]
    gradient = dy.to(weight.dtype)
    if activation:
        gradient = torch.ops.aten.silu_backward(gradient, _sums(inputs, weight, bias, reaches))
    da.copy_(gradient)
    shares = []
    for k in range(weight.shape[0]):
        share = gradient * inputs[:, k : k + rows]
        shares.append((share if reaches is None else torch.where(reaches[:, :, k], share, 0.0)).sum(dim=(0, 1)))
    return torch.stack(shares), gradient.sum(dim=(0, 1))


@fusable
def _input_gradients(
    dx: torch.Tensor,  # (s, rows, c), written
    da: torch.Tensor,  # (s, rows + K - 1, c) wide, of the block's tokens and those after
    weight: torch.Tensor,
    reaches: torch.Tensor | None,  # (s, rows + K - 1, K, 1)
) -> None:
    window, rows = weight.shape[0] - 1, dx.shape[1]
    total = da[:, :rows] * weight[window]
    for k in range(window):
        later = da[:, window - k : window - k + rows]
        if reaches is not None:
            later = torch.where(reaches[:, window - k : window - k + rows, k], later, 0.0)
        total.addcmul_(later, weight[k])
    dx.copy_(total)


def _cached(device: torch.device) -> int:
    """How many elements of a block stay in cache; a fused pass holds fewer tensors at a time."""
    return block_elements(device) * (8 if is_fused() else 1)


def _pieces(x: torch.Tensor, splits: Sequence[int]) -> Iterator[tuple[int, slice, slice]]:
    """(piece, sequences, the piece's channels); short sequences go together as long as they fit in cache."""
    start = 0
    for piece, width in enumerate(splits):
        together = max(1, _cached(x.device) // (x.shape[1] * width))
        for sequence in range(0, x.shape[0], together):
            yield piece, slice(sequence, sequence + together), slice(start, start + width)
        start += width


@torch.library.custom_op("mamba2::causal_conv1d_blocked", mutates_args=())
def conv_op(
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
    for piece, sequences, channels in _pieces(x, splits):
        taps = Taps(x, weight, bias, seq_idx, initial, sequences, channels)
        for block in taps.blocks():
            reaches = None if taps.reaches is None else taps.reaches[:, block]
            _convolve(ys[piece][sequences, block], taps.inputs(block), taps.weight, taps.bias, reaches, activation)
    return ys


@torch.library.custom_op("mamba2::causal_conv1d_blocked_backward", mutates_args=())
def conv_backward_op(
    dys: Sequence[torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    initial: torch.Tensor | None,
    activation: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight, bias and initial; empty for those not given."""
    outputs = empty_gradients(x, weight, bias, initial)
    wide = torch.promote_types(x.dtype, torch.float32)
    dx, dinitial = outputs[0], outputs[3]
    dweight, dbias = weight.new_zeros(weight.shape[::-1], dtype=wide), weight.new_zeros(weight.shape[0], dtype=wide)
    for piece, sequences, channels in _pieces(x, [dy.shape[2] for dy in dys]):
        taps = Taps(x, weight, bias, seq_idx, initial, sequences, channels)
        window, blocks, (count, _, c) = taps.window, taps.blocks(), taps.x.shape
        buffer = taps.weight.new_empty(count, max(block.stop - block.start for block in blocks) + window, c)
        after = taps.weight.new_zeros(count, window, c)  # da of the K - 1 tokens after the block
        for block in reversed(blocks):
            rows = block.stop - block.start
            da = buffer[:, : rows + window]
            da[:, rows:] = after
            reaches = later = None
            if taps.reaches is not None:
                reaches, later = taps.reaches[:, block], taps.reaches[:, block.start : block.stop + window]
            shares = _sum_gradients(
                da[:, :rows],
                dys[piece][sequences, block],
                taps.inputs(block),
                taps.weight,
                taps.bias,
                reaches,
                activation,
            )
            dweight[:, channels] += shares[0]
            dbias[channels] += shares[1]
            _input_gradients(dx[sequences, block, channels], da, taps.weight, later)
            after = da[:, :window].clone()
        if initial is not None and window:
            reaches = None if taps.reaches is None else F.pad(taps.reaches[:, :window], (0, 0, 0, 0, window, 0))
            da = F.pad(after, (0, 0, window, 0))  # there are no outputs before the first token
            _input_gradients(dinitial[sequences, :, channels], da, taps.weight, reaches)
    outputs[1].copy_(dweight.t())
    if bias is not None:
        outputs[2].copy_(dbias)
    return outputs


def empty_pieces(x: torch.Tensor, splits: Sequence[int]) -> list[torch.Tensor]:
    return [x.new_empty(*x.shape[:2], width) for width in splits]


def differentiable(forward_op: Callable, backward_op: Callable) -> Callable:
    """A backend's differentiable convolution, made of its forward and its backward operation."""
    gradients = unwatched(backward_op)

    @forward_op.register_fake
    def _(x, weight, bias, seq_idx, initial, activation, splits):
        return empty_pieces(x, splits)

    @backward_op.register_fake
    def _(dys, x, weight, bias, seq_idx, initial, activation):
        return empty_gradients(x, weight, bias, initial)

    def setup_context(ctx, inputs, output):
        *tensors, ctx.activation, ctx.splits = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    def backward(ctx, *dys):
        x, weight, bias, seq_idx, initial = ctx.saved_tensors
        if any(dy is None for dy in dys):
            zero = x.new_zeros(())
            dys = [zero.expand(*x.shape[:2], width) if dy is None else dy for dy, width in zip(dys, ctx.splits)]
        dx, dweight, dbias, dinitial = gradients(list(dys), x, weight, bias, seq_idx, initial, ctx.activation)
        # seq_idx, activation and splits have none.
        return dx, dweight, None if bias is None else dbias, None, None if initial is None else dinitial, None, None

    return register_gradient(forward_op, backward, setup_context)


_convolution = differentiable(conv_op, conv_backward_op)
