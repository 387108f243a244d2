"""Token after token on a processor, at the speed at which the weights can be read.

`Mamba2LM.step` is bound by starting operations. Here everything is laid out beforehand, and a layer is two dozen
operations on buffers that stay in cache, each between views that were made once:

- Weights stay where they are and are multiplied by vectors with `bmm` over a few equal pieces of their rows, which
  threads share (the gemv behind `mv` and `linear` runs on one); in bfloat16 a copy in oneDNN's own order is kept.
- The convolution's window is a ring of in_proj's last K outputs: a token overwrites the oldest, nothing is moved.
- The SSM state is (b, g, n, r p), r = h / g heads of a group side by side, so that reading it is a product of a row
  vector by a matrix, which streams. Steps and decays are laid out along r p as well.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from mamba2.model import Mamba2Block, Mamba2LM, MixerState, embed


class Decoder:
    """A model on a processor with the state of b rows, advanced in place; no gradients.

    Weights are read when it is made: make a new one after changing the model. Weights in half precision keep their
    dtype; steps, norms and the state are float32, as in the model.
    """

    @torch.no_grad()
    def __init__(self, model: Mamba2LM, state: list[MixerState]):
        """Start from `state` (as `Mamba2LM.prefill` returns it), which is copied."""
        cfg, b = model.config, len(state[0].ssm)
        self.embeddings = model.backbone.embeddings.weight.detach()
        head = model.lm_head.weight.detach()
        wide = torch.promote_types(head.dtype, torch.float32)
        self.stream = head.new_empty(b, cfg.hidden_size, dtype=wide if cfg.residual_in_fp32 else head.dtype)
        layers = zip(model.backbone.layers, state, strict=True)
        self.layers = [_BlockDecoder(layer, layer_state, self.stream, wide) for layer, layer_state in layers]
        self.norm_f = _Norm(model.backbone.norm_f.weight, self.stream, 1, cfg.layer_norm_epsilon, wide)
        self.logits = head.new_empty(b, cfg.vocab_size)
        self.head = row_product(head, None, self.norm_f.y, self.logits)

    @torch.inference_mode()
    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Take one token per row, (b,) int64; returns logits (b, v), which the next call overwrites."""
        self.stream.copy_(embed(input_ids, self.embeddings))
        for layer in self.layers:
            layer.step()
        self.norm_f()
        self.head()
        return self.logits

    def state(self) -> list[MixerState]:
        """A copy of the state, as `Mamba2LM.prefill` and `forward` take it."""
        return [layer.state() for layer in self.layers]


class _BlockDecoder:
    """One block; `step` adds its output to the stream."""

    def __init__(self, block: Mamba2Block, state: MixerState, stream: torch.Tensor, wide: torch.dtype):
        mixer, cfg = block.mixer, block.mixer.config
        b, K, g, n, h, p = len(state.ssm), cfg.conv_kernel, cfg.n_groups, cfg.state_size, cfg.num_heads, cfg.head_dim
        inner, conv, width = cfg.d_inner, cfg.conv_dim, cfg.d_inner // cfg.n_groups
        self.kernel, self.limit = K, cfg.time_step_limit
        self.A, self.dt_bias = -mixer.A_log.detach().to(wide).exp(), mixer.dt_bias.detach().to(wide)
        self.D = mixer.D.detach().to(wide)[:, None].expand(h, p).contiguous()

        # Row i of the ring holds the token whose position is i modulo K.
        ring = torch.zeros(K, b, cfg.d_in_proj, dtype=wide)
        ring[: K - 1, :, inner : inner + conv] = state.conv.transpose(0, 1)
        self.phase = K - 1
        self.inputs = ring[..., inner : inner + conv]  # (K, b, conv)
        self.rows = list(self.inputs.unbind(0))
        self.gates = list(ring[..., :inner].unflatten(-1, (g, width)).unbind(0))  # K of (b, g, r p)
        self.dts = list(ring[..., inner + conv :].unbind(0))  # K of (b, h)
        taps = mixer.conv1d.weight.detach().squeeze(1).t().to(wide)  # (K, conv), the last row meets the newest token
        self.taps = list(taps.contiguous().unbind(0))
        bias = mixer.conv1d.bias
        self.conv_bias = taps.new_zeros(conv) if bias is None else bias.detach().to(wide)

        self.ssm = ring.new_empty(b, g, n, width)
        self.by_head = self.ssm.view(b, g, n, h // g, p)
        self.by_head.copy_(state.ssm.unflatten(1, (g, h // g)).permute(0, 1, 4, 2, 3))
        self.by_group = self.ssm.view(b * g, n, width)
        self.xBC = ring.new_empty(b, conv)
        self.x = self.xBC[:, :inner].unflatten(-1, (h, p))
        self.B = self.xBC[:, inner : inner + g * n].view(b, g, n, 1)
        self.C = self.xBC[:, inner + g * n :].unflatten(-1, (g, n))
        self.C_rows = self.C.reshape(b * g, 1, n)  # with one row of the batch a view
        self.dt, self.decay = ring.new_empty(b, h), ring.new_empty(b, h)
        self.dt_by_head, self.decay_by_head = self.dt[..., None], self.decay[..., None]
        self.dtx, self.decays, self.y = (ring.new_empty(b, h, p) for _ in range(3))
        self.decays_by_group, self.dtx_by_group = (t.view(b, g, 1, width) for t in (self.decays, self.dtx))
        self.y_by_group, self.y_gated = self.y.view(b * g, 1, width), self.y.view(b, g, width)

        self.norm = _Norm(block.norm.weight, stream, 1, cfg.layer_norm_epsilon, wide)
        self.gated_norm = _Norm(mixer.norm.weight, self.y_gated, g, cfg.layer_norm_epsilon, wide)
        weight, bias = mixer.in_proj.weight.detach(), mixer.in_proj.bias
        self.in_proj = row_product(weight, bias, self.norm.y, *ring.unbind(0))
        weight, bias = mixer.out_proj.weight.detach(), mixer.out_proj.bias
        self.out_proj = row_product(weight, bias, self.gated_norm.y, stream, accumulate=True)

    def step(self) -> None:
        phase = self.phase
        self.norm()
        self.in_proj(phase)
        torch.addcmul(self.conv_bias, self.rows[phase], self.taps[-1], out=self.xBC)
        for back in range(1, self.kernel):
            self.xBC.addcmul_(self.rows[phase - back], self.taps[-1 - back])
        F.silu(self.xBC, inplace=True)

        dt = torch.add(self.dts[phase], self.dt_bias, out=self.dt)  # (b, h)
        torch._C._nn.softplus(dt, out=dt)
        if self.limit != (0.0, math.inf):
            dt.clamp_(*self.limit)
        torch.mul(self.x, self.dt_by_head, out=self.dtx)
        torch.mul(dt, self.A, out=self.decay).exp_()
        self.decays.copy_(self.decay_by_head)
        self.ssm.mul_(self.decays_by_group).addcmul_(self.dtx_by_group, self.B)
        if len(dt) > 1:
            self.C_rows.view_as(self.C).copy_(self.C)
        torch.bmm(self.C_rows, self.by_group, out=self.y_by_group)
        self.y.addcmul_(self.x, self.D)

        self.y_gated.mul_(F.silu(self.gates[phase]))
        self.gated_norm()
        self.out_proj()
        self.phase = (phase + 1) % self.kernel

    def state(self) -> MixerState:
        window = self.inputs.roll(-self.phase, dims=0)[1:]  # oldest first, without the oldest of K
        by_head = self.by_head.permute(0, 1, 3, 4, 2).flatten(1, 2)  # (b, h, p, n)
        return MixerState(window.transpose(0, 1).contiguous(), by_head.contiguous())


class _Norm:
    """y = weight · x / sqrt(mean(x²) + eps) over each of `ngroups` slices of the channels, between fixed buffers.

    x is (b, d) or (b, g, d / g); y (b, d) in the weight's dtype.
    """

    def __init__(self, weight: torch.Tensor, x: torch.Tensor, ngroups: int, eps: float, wide: torch.dtype):
        self.width = weight.numel() // ngroups
        self.x, self.weight = x, weight.detach().to(wide)
        self.eps = torch.full((1, 1, 1), eps, dtype=wide)
        # x itself where it is wide already, else a copy that each call fills
        self.wide = x.view(-1, 1, self.width).to(wide)
        self.copies = self.wide.data_ptr() != x.data_ptr()
        self.column = self.wide.transpose(1, 2)
        self.scale = torch.empty(len(self.wide), 1, 1, dtype=wide)
        self.normed = torch.empty_like(self.wide)
        self.rows = self.normed.view(x.shape[0], -1)  # (b, d)
        self.y = torch.empty_like(self.rows, dtype=weight.dtype)

    def __call__(self) -> None:
        if self.copies:
            self.wide.copy_(self.x.view_as(self.wide))
        torch.baddbmm(self.eps, self.wide, self.column, alpha=1.0 / self.width, out=self.scale)  # mean square + eps
        torch.mul(self.wide, self.scale.rsqrt_(), out=self.normed)
        torch.mul(self.rows, self.weight, out=self.y)


def row_product(
    weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, *outs: torch.Tensor, accumulate: bool = False
) -> Callable[..., None]:
    """A function of i (0 if left out) that writes, or adds, weight @ x + bias to outs[i].

    x (batch, columns) and outs (batch, rows) are buffers that stay where they are; for a handful of rows of x, when
    reading the weight is all the cost.
    """
    rows, columns = weight.shape
    batch = len(x)
    bias = None if bias is None else bias.detach()
    if weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, batch)
        linear = torch.ops.mkldnn._linear_pointwise.default
        move = [out.add_ if accumulate else out.copy_ for out in outs]

        def product(i: int = 0) -> None:
            move[i](linear(x, packed, bias, "none", [], ""))

        return product

    pieces = next(k for k in range(min(rows, torch.get_num_threads()), 0, -1) if rows % k == 0)
    split, vectors = weight.view(pieces, -1, columns), x.t().expand(pieces, columns, batch)
    if batch == 1 and outs[0].dtype == weight.dtype:  # the product is laid out as the result is
        targets = [out.view(pieces, -1, 1) for out in outs]
    else:
        targets, partial = None, torch.empty(pieces, rows // pieces, batch, dtype=weight.dtype)
        result = partial.view(rows, batch).t()

    def product(i: int = 0) -> None:
        if targets is None:
            torch.bmm(split, vectors, out=partial)
            _ = outs[i].add_(result) if accumulate else outs[i].copy_(result)
        elif accumulate:
            targets[i].baddbmm_(split, vectors)
        else:
            torch.bmm(split, vectors, out=targets[i])
        if bias is not None:
            outs[i].add_(bias)

    return product
