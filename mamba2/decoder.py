"""Token after token on a processor, at the speed at which the weights can be read.

`Mamba2LM.step` is bound by starting operations. Here everything is laid out beforehand, and a layer is two dozen
operations on buffers that stay in cache:

- Weights stay where they are and are multiplied by vectors with `bmm` over a few equal pieces of their rows, which
  threads share (the gemv behind `mv` and `linear` runs on one); in bfloat16 a copy in oneDNN's own order is kept.
- The convolution's window is a ring of in_proj's last K outputs. A token overwrites the oldest, and the weights turn
  with it: nothing is moved. One more row holds ones and stands for the bias.
- The SSM state is (b, g, n, r p), r = h / g heads of a group side by side, so that reading it is a product of a row
  vector by a matrix, which streams. Steps and decays are laid out along r p as well.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from mamba2.model import Mamba2Block, Mamba2LM, MixerState


class Decoder:
    """A model on a processor with the state of b rows, advanced in place; no gradients.

    Weights are read when it is made: make a new one after changing the model. Weights in half precision keep their
    dtype; steps, norms and the state are float32, as in the model.
    """

    @torch.no_grad()
    def __init__(self, model: Mamba2LM, state: list[MixerState]):
        """Start from `state` (as `Mamba2LM.prefill` returns it), which is copied."""
        cfg = model.config
        self.batch = len(state[0].ssm)
        self.embeddings = model.backbone.embeddings.weight.detach()
        head = model.lm_head.weight.detach()
        self.dtype, wide = head.dtype, torch.promote_types(head.dtype, torch.float32)
        self.stream_dtype = wide if cfg.residual_in_fp32 else self.dtype
        layers = zip(model.backbone.layers, state, strict=True)
        self.layers = [_BlockDecoder(layer, layer_state, wide) for layer, layer_state in layers]
        self.norm_f = _Norm(model.backbone.norm_f.weight, self.batch, 1, cfg.layer_norm_epsilon, wide)
        self.head = row_product(head, None, self.batch)
        self.logits = head.new_empty(self.batch, cfg.vocab_size)

    @torch.inference_mode()
    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Take one token per row, (b,) int64; returns logits (b, v), which the next call overwrites."""
        stream = F.embedding(input_ids, self.embeddings).to(self.stream_dtype)  # (b, d)
        for layer in self.layers:
            layer.step(stream)
        return self.head(self.norm_f(stream), self.logits)

    def state(self) -> list[MixerState]:
        """A copy of the state, as `Mamba2LM.prefill` and `forward` take it."""
        return [layer.state() for layer in self.layers]


class _BlockDecoder:
    """One block; `step` adds its output to the stream in place."""

    def __init__(self, block: Mamba2Block, state: MixerState, wide: torch.dtype):
        mixer, cfg = block.mixer, block.mixer.config
        b, K, g, n, h, p = len(state.ssm), cfg.conv_kernel, cfg.n_groups, cfg.state_size, cfg.num_heads, cfg.head_dim
        inner, conv, width = cfg.d_inner, cfg.conv_dim, cfg.d_inner // cfg.n_groups
        self.kernel, self.limit = K, cfg.time_step_limit
        self.norm = _Norm(block.norm.weight, b, 1, cfg.layer_norm_epsilon, wide)
        self.gated_norm = _Norm(mixer.norm.weight, b, g, cfg.layer_norm_epsilon, wide)
        self.in_proj = row_product(mixer.in_proj.weight.detach(), mixer.in_proj.bias, b)
        self.out_proj = row_product(mixer.out_proj.weight.detach(), mixer.out_proj.bias, b)

        def per_channel(parameter: torch.Tensor) -> torch.Tensor:  # (h,) -> (h, p)
            return parameter.detach().to(wide)[:, None].expand(h, p).contiguous()

        self.A, self.dt_bias, self.D = -per_channel(mixer.A_log).exp(), per_channel(mixer.dt_bias), per_channel(mixer.D)

        # Row i of the ring holds the token whose position is i modulo K.
        self.phase = K - 1
        ring = torch.zeros(K + 1, b, cfg.d_in_proj, dtype=wide)
        ring[: K - 1, :, inner : inner + conv] = state.conv.transpose(0, 1)
        ring[K] = 1.0
        self.inputs = ring[..., inner : inner + conv]  # (K + 1, b, conv)
        self.rows = list(ring[:K])
        self.gates = list(ring[:K, :, :inner].unflatten(-1, (g, width)).unbind(0))  # K of (b, g, r p)
        self.dts = list(ring[:K, :, inner + conv :, None].unbind(0))  # K of (b, h, 1)
        weight = mixer.conv1d.weight.detach().squeeze(1).t().to(wide)  # (K, conv), the last row meets the newest token
        bias = weight.new_zeros(conv) if mixer.conv1d.bias is None else mixer.conv1d.bias.detach().to(wide)
        self.taps = [torch.cat([weight.roll(phase + 1, dims=0), bias[None]])[:, None] for phase in range(K)]
        self.products = ring.new_empty(K + 1, b, conv)

        self.ssm = ring.new_empty(b, g, n, width)
        self.by_head = self.ssm.view(b, g, n, h // g, p)
        self.by_head.copy_(state.ssm.unflatten(1, (g, h // g)).permute(0, 1, 4, 2, 3))
        self.by_group = self.ssm.view(b * g, n, width)
        self.xBC = ring.new_empty(b, conv)
        self.x = self.xBC[:, :inner].unflatten(-1, (h, p))
        self.B = self.xBC[:, inner : inner + g * n].view(b, g, n, 1)
        self.C = self.xBC[:, inner + g * n :].view(b, g, 1, n)
        self.dt, self.dtx, self.y = (ring.new_empty(b, h, p) for _ in range(3))
        self.decay_by_group, self.dtx_by_group = (t.view(b, g, 1, width) for t in (self.dt, self.dtx))
        self.y_by_group, self.y_gated = self.y.view(b * g, 1, width), self.y.view(b, g, width)

    def step(self, stream: torch.Tensor) -> None:  # (b, d)
        phase = self.phase
        self.in_proj(self.norm(stream), self.rows[phase])
        torch.mul(self.inputs, self.taps[phase], out=self.products)
        torch.sum(self.products, 0, out=self.xBC)
        F.silu(self.xBC, inplace=True)

        dt = torch.add(self.dts[phase], self.dt_bias, out=self.dt)  # (b, h, p)
        torch._C._nn.softplus(dt, out=dt)
        if self.limit != (0.0, math.inf):
            dt.clamp_(*self.limit)
        torch.mul(self.x, dt, out=self.dtx)
        dt.mul_(self.A).exp_()
        self.ssm.mul_(self.decay_by_group).addcmul_(self.dtx_by_group, self.B)
        torch.bmm(self.C.reshape(-1, 1, self.C.shape[-1]), self.by_group, out=self.y_by_group)
        self.y.addcmul_(self.x, self.D)

        self.out_proj(self.gated_norm(self.y_gated.mul_(F.silu(self.gates[phase]))), stream, accumulate=True)
        self.phase = (phase + 1) % self.kernel

    def state(self) -> MixerState:
        window = self.inputs[: self.kernel].roll(-self.phase, dims=0)[1:]  # oldest first, without the oldest of K
        by_head = self.by_head.permute(0, 1, 3, 4, 2).flatten(1, 2)  # (b, h, p, n)
        return MixerState(window.transpose(0, 1).contiguous(), by_head.contiguous())


class _Norm:
    """weight · x / sqrt(mean(x²) + eps) over each of `ngroups` slices of the channels; to the dtype of the weight."""

    def __init__(self, weight: torch.Tensor, batch: int, ngroups: int, eps: float, wide: torch.dtype):
        self.dtype, self.wide, self.shape = weight.dtype, wide, (batch, weight.numel())
        self.weight = weight.detach().to(wide)
        self.width = weight.numel() // ngroups
        self.eps = torch.full((1, 1, 1), eps, dtype=wide)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:  # (b, d) or (b, g, d / g) -> (b, d)
        x = x.to(self.wide).view(-1, 1, self.width)
        mean_square = torch.baddbmm(self.eps, x, x.transpose(1, 2), alpha=1.0 / self.width)  # (b g, 1, 1)
        return (x * mean_square.rsqrt_()).view(self.shape).mul_(self.weight).to(self.dtype)


def row_product(weight: torch.Tensor, bias: torch.Tensor | None, batch: int) -> Callable:
    """A function `product(x, out, accumulate=False)` that writes, or adds, weight @ x + bias to out, and returns out.

    x (batch, columns) and out (batch, rows), for a handful of rows of x, when reading the weight is all the cost.
    """
    rows, columns = weight.shape
    bias = None if bias is None else bias.detach()
    if weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, batch)
        linear = torch.ops.mkldnn._linear_pointwise.default

        def product(x: torch.Tensor, out: torch.Tensor, accumulate: bool = False) -> torch.Tensor:
            y = linear(x, packed, bias, "none", [], "")
            return out.add_(y) if accumulate else out.copy_(y)

        return product

    pieces = next(k for k in range(min(rows, torch.get_num_threads()), 0, -1) if rows % k == 0)
    split = weight.view(pieces, -1, columns)

    def product(x: torch.Tensor, out: torch.Tensor, accumulate: bool = False) -> torch.Tensor:
        vectors = x.t().expand(pieces, columns, batch)
        if batch == 1 and out.dtype == weight.dtype:
            out.view(pieces, -1, 1).baddbmm_(split, vectors, beta=float(accumulate))
        else:
            y = torch.bmm(split, vectors).view(rows, batch).t()
            out = out.add_(y) if accumulate else out.copy_(y)
        return out if bias is None else out.add_(bias)

    return product
