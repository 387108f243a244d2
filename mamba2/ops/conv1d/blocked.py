"""The convolution for speed in plain torch: the mathematics of `reference.py`, in blocks of rows that stay in cache.

Kept for the backward are the inputs alone. With a the sum before SiLU and da = dy silu'(a):

    dx_t = Σ_k weight_k da_{t+K-1-k}        dweight_k = Σ_t da_t x_{t-(K-1)+k}        dbias = Σ_t da_t

where a term between two documents is left out.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from mamba2.ops.conv1d.reference import causal_conv1d_reference, last_inputs
from mamba2.ops.device import block_elements


def causal_conv1d_blocked(
    x: torch.Tensor,  # (b, l, d)
    weight: torch.Tensor,  # (d, K)
    bias: torch.Tensor | None,  # (d,)
    seq_idx: torch.Tensor | None,  # (b, l)
    initial_state: torch.Tensor | None,  # (b, K - 1, d)
    activation: bool,
    return_final_state: bool,
    splits: tuple[int, ...],
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """See `mamba2.ops.causal_conv1d`. Returns the pieces of y and, if asked for, the last K - 1 inputs."""
    if torch.compiler.is_compiling():
        # The compiler fuses the readable form by itself.
        return causal_conv1d_reference(x, weight, bias, seq_idx, initial_state, activation, return_final_state, splits)
    ys = conv_op(x, weight, bias, seq_idx, initial_state, activation, splits)
    return tuple(ys), last_inputs(x, weight.shape[1] - 1, initial_state, seq_idx) if return_final_state else None


class Taps:
    """One sequence and one piece of the channels: its inputs in blocks, and which tap reaches across a document."""

    def __init__(self, x, weight, bias, seq_idx, initial, sequence: int, channels: slice):
        wide = torch.promote_types(x.dtype, torch.float32)
        self.window = weight.shape[1] - 1
        self.x = x[sequence, :, channels]  # (l, c)
        self.weight = weight[channels].to(wide).t().contiguous()  # (K, c)
        self.bias = None if bias is None else bias[channels].to(wide)
        self.initial = None if initial is None else initial[sequence, :, channels]  # (K - 1, c)
        self.reaches = None
        if seq_idx is not None:
            changes = (seq_idx[sequence, 1:] != seq_idx[sequence, :-1]).cumsum(dim=0)
            document = F.pad(changes, (self.window + 1, 0))  # (window + l,), the window belongs to the first token's
            length = self.x.shape[0]
            # (K, l, 1): does tap k of token t see a token of t's own document?
            self.reaches = torch.stack(
                [document[k : k + length] == document[self.window :] for k in range(self.window + 1)]
            )
            self.reaches = self.reaches.unsqueeze(-1)
        self.size = max(self.window, 1, block_elements(x.device) // self.x.shape[1])

    def blocks(self) -> list[slice]:
        length = self.x.shape[0]
        return [slice(start, min(start + self.size, length)) for start in range(0, length, self.size)]

    def load(self, block: slice) -> torch.Tensor:
        """Inputs of the block's tokens and of the window before, (window + rows, c), wide."""
        inputs = self.weight.new_empty(self.window + block.stop - block.start, self.x.shape[1])
        missing = max(0, self.window - block.start)
        if missing:
            inputs[:missing] = 0.0 if self.initial is None else self.initial[self.window - missing :]
        inputs[missing:] = self.x[block.start - self.window + missing : block.stop]
        return inputs

    def own(self, k: int, block: slice, values: torch.Tensor) -> torch.Tensor:
        """`values` (rows, c) of tap k, zero where the tap reaches into another document."""
        if self.reaches is None or k == self.window:
            return values
        return torch.where(self.reaches[k, block], values, 0.0)

    def sums(self, inputs: torch.Tensor, block: slice) -> torch.Tensor:
        """Σ_k weight_k x_{t-(K-1)+k} + bias, (rows, c)."""
        rows = block.stop - block.start
        total = inputs[self.window :] * self.weight[self.window]
        for k in range(self.window):
            total.addcmul_(self.own(k, block, inputs[k : k + rows]), self.weight[k])
        return total if self.bias is None else total.add_(self.bias)


def _pieces(batch: int, splits: Sequence[int]) -> Iterator[tuple[int, int, slice]]:
    """(piece, sequence, the piece's channels)"""
    start = 0
    for piece, width in enumerate(splits):
        for sequence in range(batch):
            yield piece, sequence, slice(start, start + width)
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
    ys = [x.new_empty(*x.shape[:2], width) for width in splits]
    for piece, sequence, channels in _pieces(x.shape[0], splits):
        taps = Taps(x, weight, bias, seq_idx, initial, sequence, channels)
        for block in taps.blocks():
            sums = taps.sums(taps.load(block), block)
            ys[piece][sequence, block] = F.silu(sums, inplace=True) if activation else sums
    return ys


@conv_op.register_fake
def _(x, weight, bias, seq_idx, initial, activation, splits):
    return [x.new_empty(*x.shape[:2], width) for width in splits]


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
    outputs = _gradients(x, weight, bias, initial)
    wide = torch.promote_types(x.dtype, torch.float32)
    dx, dinitial = outputs[0], outputs[3]
    dweight, dbias = weight.new_zeros(weight.shape[::-1], dtype=wide), weight.new_zeros(weight.shape[0], dtype=wide)
    for piece, sequence, channels in _pieces(x.shape[0], [dy.shape[2] for dy in dys]):
        taps = Taps(x, weight, bias, seq_idx, initial, sequence, channels)
        window = taps.window
        # What the tokens of the block after give to the last inputs of this one.
        carried = taps.weight.new_zeros(window, taps.x.shape[1])
        for block in reversed(taps.blocks()):
            rows = block.stop - block.start
            inputs = taps.load(block)
            da = dys[piece][sequence, block].to(wide)  # (rows, c)
            if activation:
                da = torch.ops.aten.silu_backward(da, taps.sums(inputs, block))
            dinputs = da.new_zeros(inputs.shape)  # (window + rows, c)
            dinputs[rows:] = carried
            for k in range(window + 1):
                own = taps.own(k, block, da)
                dinputs[k : k + rows].addcmul_(own, taps.weight[k])
                dweight[k, channels] += (own * inputs[k : k + rows]).sum(dim=0)
            dbias[channels] += da.sum(dim=0)
            dx[sequence, block, channels] = dinputs[window:]
            carried = dinputs[:window]
        if initial is not None:
            dinitial[sequence, :, channels] = carried
    outputs[1].copy_(dweight.t())
    if bias is not None:
        outputs[2].copy_(dbias)
    return outputs


@conv_backward_op.register_fake
def _(dys, x, weight, bias, seq_idx, initial, activation):
    return _gradients(x, weight, bias, initial)


def _gradients(*inputs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return tuple(inputs[0].new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation, ctx.splits = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx, dys):
    x, weight, bias, seq_idx, initial = ctx.saved_tensors
    zero = x.new_zeros(())
    dys = [zero.expand(*x.shape[:2], width) if dy is None else dy for dy, width in zip(dys, ctx.splits)]
    dx, dweight, dbias, dinitial = conv_backward_op(dys, x, weight, bias, seq_idx, initial, ctx.activation)
    # seq_idx, activation and splits have none.
    return dx, dweight, None if bias is None else dbias, None, None if initial is None else dinitial, None, None


conv_op.register_autograd(_backward, setup_context=_setup_context)
