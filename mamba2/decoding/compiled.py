"""Decoding on a CPU with the whole step compiled into one C++ function.

`Mamba2LM.step` runs about 400 operations per token. Here the step is written with the reference forms of `mamba2.ops`,
and torch.compile turns all layers into one function without operator calls. For this, matrix products with a single
row are written as sums, which become loops of that function; with several rows a matrix product is called.

Compiling takes about 15 seconds, once per model shape and number of rows, and needs a C++ compiler.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F

from mamba2.mixer import MixerState, by_head, conv_widths
from mamba2.model import Mamba2Block, Mamba2LM
from mamba2.ops.fusion import compile_like, require_cxx_compiler
from mamba2.ops.norm_torch import add_rms_norm_reference, gated_rms_norm_reference
from mamba2.ops.ssd.reference import ssd_step_reference

_steps: dict[tuple, Callable] = {}


class CompiledDecoder:
    """A model on a CPU with the state of b rows. No gradients.

    The weights are read once: make a new decoder after changing the model. Half-precision weights keep their dtype; the
    state and all computation are float32.
    """

    @torch.no_grad()
    def __init__(self, model: Mamba2LM, state: list[MixerState]):
        """Start from a copy of `state`, as returned by `Mamba2LM.prefill`. Raises ValueError without a C++ compiler."""
        require_cxx_compiler()
        self.config = model.config
        self.embeddings, self.head = model.backbone.embeddings.weight.detach(), model.lm_head.weight.detach()
        self.norm_f = model.backbone.norm_f.weight.detach()
        self.layers = [
            _Layer.of(layer, layer_state, self.head.dtype)
            for layer, layer_state in zip(model.backbone.layers, state, strict=True)
        ]
        self._compiled = _compile(self)

    @torch.no_grad()
    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Take one token per row, (b,) int64; returns logits (b, v), not rounded to half precision."""
        rows = len(self.layers[0].ssm)
        if input_ids.shape != (rows,) or input_ids.dtype != torch.long:  # the compiled function does not check this
            raise ValueError(f"input_ids must be ({rows},) int64, not {tuple(input_ids.shape)} {input_ids.dtype}")
        return self._compiled(self, input_ids.contiguous())

    @torch.no_grad()
    def state(self) -> list[MixerState]:
        """A copy of the state, in the form that `Mamba2LM.prefill` and `forward` take."""
        return [layer.state() for layer in self.layers]

    def _step(self, input_ids: torch.Tensor) -> torch.Tensor:
        cfg = self.config
        wide = torch.promote_types(self.head.dtype, torch.float32)
        x, residual = F.embedding(input_ids, self.embeddings), None  # (b, d)
        if cfg.residual_in_fp32:
            x = x.to(wide)
        for layer in self.layers:
            u, residual = add_rms_norm_reference(x, residual, layer.norm, cfg.layer_norm_epsilon, wide)
            zxBCdt = _product(u, layer.in_proj, layer.in_bias)
            z, xBC, dt = zxBCdt.split([cfg.d_inner, cfg.conv_dim, cfg.num_heads], dim=-1)
            x, B, C = by_head(cfg, *_convolve(layer, xBC).split(conv_widths(cfg), dim=-1))
            y = ssd_step_reference(
                layer.ssm,
                x,  # (b, h, p)
                dt,  # (b, h)
                -layer.A_log.exp(),
                B,  # (b, g, n)
                C,
                D=layer.D,
                z=None,
                dt_bias=layer.dt_bias,
                dt_softplus=True,
                dt_limit=cfg.time_step_limit,
            )
            y = gated_rms_norm_reference(y.flatten(-2), z, layer.gated_norm, cfg.layer_norm_epsilon, cfg.n_groups)
            x = _product(y, layer.out_proj, layer.out_bias)
        hidden, _ = add_rms_norm_reference(x, residual, self.norm_f, cfg.layer_norm_epsilon, wide)
        return _product(hidden, self.head, None)


class _Layer(NamedTuple):
    """The weights of one block and its state, which a step updates in place."""

    norm: torch.Tensor  # (d,)
    in_proj: torch.Tensor  # (d_inner + conv + h, d), conv = d_inner + 2 g n
    in_bias: torch.Tensor | None
    taps: torch.Tensor  # (K, conv), the weights of the convolution; the last row is for the newest token
    conv_bias: torch.Tensor | None  # (conv,)
    dt_bias: torch.Tensor  # (h,)
    A_log: torch.Tensor  # (h,)
    D: torch.Tensor  # (h,)
    gated_norm: torch.Tensor  # (d_inner,)
    out_proj: torch.Tensor  # (d, d_inner)
    out_bias: torch.Tensor | None
    window: list[torch.Tensor]  # K - 1 of (b, conv), oldest first; separate tensors shift within the convolution's loop
    ssm: torch.Tensor  # (b, h, p, n)

    @classmethod
    def of(cls, block: Mamba2Block, state: MixerState, dtype: torch.dtype) -> Self:
        """Projections in `dtype`, the rest in the state's dtype, all contiguous (copied only if they are not)."""
        mixer, wide = block.mixer, state.ssm.dtype

        def of_dtype(parameter: torch.Tensor | None, dtype: torch.dtype = wide) -> torch.Tensor | None:
            return None if parameter is None else parameter.detach().to(dtype).contiguous()

        return cls(
            of_dtype(block.norm.weight),
            of_dtype(mixer.in_proj.weight, dtype),
            of_dtype(mixer.in_proj.bias),
            of_dtype(mixer.conv1d.weight.squeeze(1).t()),
            of_dtype(mixer.conv1d.bias),
            of_dtype(mixer.dt_bias),
            of_dtype(mixer.A_log),
            of_dtype(mixer.D),
            of_dtype(mixer.norm.weight),
            of_dtype(mixer.out_proj.weight, dtype),
            of_dtype(mixer.out_proj.bias),
            [row.to(wide, copy=True) for row in state.conv.unbind(1)],
            state.ssm.clone(memory_format=torch.contiguous_format),
        )

    def state(self) -> MixerState:
        none = self.ssm.new_empty(len(self.ssm), 0, self.taps.shape[1])  # with K = 1 the window is empty
        return MixerState(torch.cat([none, *(row[:, None] for row in self.window)], dim=1), self.ssm.clone())


def _compile(decoder: CompiledDecoder) -> Callable[[CompiledDecoder, torch.Tensor], torch.Tensor]:
    """`CompiledDecoder._step` compiled for decoders with the same key: config, rows, dtypes and threads."""
    # The computation depends neither on how dt_bias was initialised nor on unknown keys that are only passed on.
    config = dataclasses.replace(decoder.config, dt_bias_init=None, extra={})
    batch = len(decoder.layers[0].ssm)
    key = (repr(config), batch, decoder.head.dtype, decoder.embeddings.dtype, torch.get_num_threads())
    if key not in _steps:
        _steps[key] = compile_like(CompiledDecoder._step, decoder, torch.zeros(batch, dtype=torch.long))
    return _steps[key]


def _convolve(layer: _Layer, xBC: torch.Tensor) -> torch.Tensor:
    """The causal convolution's output for the newest inputs xBC (b, conv). Shifts the window by one."""
    rows = [*layer.window, xBC]
    y = sum(row * tap for row, tap in zip(rows, layer.taps, strict=True))
    for row, newer in itertools.pairwise(rows):
        row.copy_(newer)
    return F.silu(y if layer.conv_bias is None else y + layer.conv_bias)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (b, columns) times weight (rows, columns) plus bias: (b, rows), in x's dtype."""
    if len(x) > 1:
        y = F.linear(x.to(weight.dtype), weight).to(x.dtype)
    else:
        # as_strided forces x into memory; otherwise the norm would be fused and recomputed for every row of the weight.
        y = (weight.to(x.dtype) * x.as_strided(x.shape, x.stride())).sum(-1)[None]
    return y if bias is None else y + bias
