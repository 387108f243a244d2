"""The Mamba-2 mixer (Dao & Gu 2024, section 7): projection in, causal convolution, SSD, gated norm, projection out.

A mixer owns all that depends on its kind: how its parameters are initialised, its cost, its state. To add another one,
write a file with these methods and add a line to `mamba2.model.build_mixer`:

    forward(u, seq_idx, state, return_state, cu_seqlens) -> (y, state)
                                                               u and y (b, l, d); state None: start empty;
                                                               cu_seqlens: returns the state after each document
    step(u, state) -> y                                        one token, (b, d); updates the state in place
    new_state(batch) -> state                                  an empty state, with rows(), detach() and join()
    init_parameters(generator)                                 all but dt_bias
    in_proj_rows() -> (rows, ...)                              rows of each matrix that is fused in in_proj.weight
    flops_per_token(length) -> int                             of the forward pass

d_inner = h p; b batch, l seqlen, d hidden_size, h nheads, p headdim, g ngroups, n d_state, K conv_kernel.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import nn

from mamba2.config import Mamba2Config
from mamba2.ops import causal_conv1d, causal_conv1d_step, gated_rms_norm, ssd, ssd_step


class MixerState(NamedTuple):
    """The state of one mixer after the tokens so far."""

    conv: torch.Tensor  # (b, K - 1, d_inner + 2 g n), the last inputs of the convolution
    ssm: torch.Tensor  # (b, h, p, n), float32

    def detach(self) -> Self:
        """The same values without gradient, for truncated back-propagation through time."""
        return MixerState(self.conv.detach(), self.ssm.detach())

    def rows(self, index: list[int] | slice) -> Self:
        """A copy of the rows `index` of the batch, with repetitions if it has any."""
        return MixerState(self.conv[index].clone(), self.ssm[index].clone())

    def copy_(self, other: Self) -> None:
        """Overwrite this state in place with another of the same shape. For CUDA graphs."""
        self.conv.copy_(other.conv)
        self.ssm.copy_(other.ssm)

    @staticmethod
    def join(states: Sequence["MixerState"]) -> "MixerState":
        """Concatenate along the batch."""
        return MixerState(*(torch.cat(parts) for parts in zip(*states, strict=True)))


class Parameters(nn.Module):
    """A weight and an optional bias, under the names that checkpoints use. The computation is in `mamba2.ops`."""

    def __init__(self, *shape: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[0])) if bias else None


class Linear(nn.Linear):
    """nn.Linear without its own initialisation: `init_parameters` does it, from a generator of its own."""

    def reset_parameters(self) -> None:
        pass


class SplitLinear(Linear):
    """One fused weight with one output (..., width) per part, each computed by its own matrix product.

    With one product and a split, the backward pass would first concatenate the gradients of the parts, an extra read
    and write of the whole width for every token.
    """

    def __init__(self, in_features: int, widths: tuple[int, ...], bias: bool):
        super().__init__(in_features, sum(widths), bias)
        self.widths = widths

    def forward(self, u: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights = self.weight.split(self.widths)
        biases = (None,) * len(weights) if self.bias is None else self.bias.split(self.widths)
        return tuple(F.linear(u, weight, bias) for weight, bias in zip(weights, biases))


class Mamba2Mixer(nn.Module):
    """(b, l, d) -> (b, l, d)."""

    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.config = config
        widths = config.d_inner, config.conv_dim, config.num_heads
        self.in_proj = SplitLinear(config.hidden_size, widths, bias=config.use_bias)
        self.conv1d = Parameters(config.conv_dim, 1, config.conv_kernel, bias=config.use_conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(config.num_heads))
        self.A_log = nn.Parameter(torch.empty(config.num_heads))
        self.D = nn.Parameter(torch.empty(config.num_heads))
        self.norm = Parameters(config.d_inner)
        self.out_proj = Linear(config.d_inner, config.hidden_size, bias=config.use_bias)

    def forward(
        self,
        u: torch.Tensor,
        seq_idx: torch.Tensor | None = None,
        state: MixerState | None = None,
        return_state: bool = True,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, MixerState | None]:
        """u (b, l, d) -> y (b, l, d), and with `return_state` the new state. `state` None starts from zeros.

        `cu_seqlens` is in place of `seq_idx` and `state` (see `mamba2.ops.ssd`); the new state is then that after each
        document, as a batch.
        """
        z, xBC, dt = self.in_proj(u)  # (b, l, d_inner), (b, l, d_inner + 2 g n), (b, l, h)
        (x, B, C), conv_state = self.convolve(xBC, seq_idx, state, return_state, cu_seqlens)
        y = ssd(
            x,
            dt,
            self.A(),
            B,
            C,
            self.config.chunk_size,
            D=self.D,
            dt_bias=self.dt_bias,
            initial_states=None if state is None else state.ssm,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            dt_softplus=True,
            dt_limit=self.config.time_step_limit,
            return_final_states=return_state,
        )
        y, ssm_state = y if return_state else (y, None)  # (b, l, h, p), (b, h, p, n)
        return self._finish(y, z), MixerState(conv_state, ssm_state) if return_state else None

    def step(self, u: torch.Tensor, state: MixerState) -> torch.Tensor:
        """`forward` for one token: u (b, d) -> (b, d). Updates `state` in place."""
        z, xBC, dt = self.in_proj(u)  # (b, d_inner), (b, d_inner + 2 g n), (b, h)
        xBC = causal_conv1d_step(state.conv, xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias)
        x, B, C = by_head(self.config, *xBC.split(conv_widths(self.config), dim=-1))
        y = ssd_step(
            state.ssm,
            x,
            dt,
            self.A(),
            B,
            C,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.config.time_step_limit,
        )
        return self._finish(y, z)

    def convolve(
        self,
        xBC: torch.Tensor,
        seq_idx: torch.Tensor | None,
        state: MixerState | None,
        return_state: bool,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None]:
        """The causal convolution of xBC (b, l, d_inner + 2 g n), split into x (b, l, h, p), B and C (b, l, g, n), and
        its new state."""
        pieces = causal_conv1d(
            xBC,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            seq_idx=seq_idx,
            initial_state=None if state is None else state.conv,
            return_final_state=return_state,
            splits=conv_widths(self.config),
            cu_seqlens=cu_seqlens,
        )
        pieces, conv_state = pieces if return_state else (pieces, None)
        return by_head(self.config, *pieces), conv_state

    def A(self) -> torch.Tensor:
        """A of each head (h,), negative, in float32 or float64."""
        return -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()

    def _finish(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        # The norm is per group, in training and evaluation alike.
        eps, ngroups = self.config.layer_norm_epsilon, self.config.n_groups
        return self.out_proj(gated_rms_norm(y.flatten(-2), z, self.norm.weight, eps, ngroups=ngroups))

    def new_state(self, batch: int) -> MixerState:
        cfg, weight = self.config, self.out_proj.weight
        ssm = torch.promote_types(weight.dtype, torch.float32)
        return MixerState(
            weight.new_zeros(batch, cfg.conv_kernel - 1, cfg.conv_dim),
            weight.new_zeros(batch, cfg.num_heads, cfg.head_dim, cfg.state_size, dtype=ssm),
        )

    def init_parameters(self, generator: torch.Generator) -> None:
        """Initialise all parameters but dt_bias, by the config's `weight_init`."""
        cfg = self.config
        for linear in (self.in_proj, self.out_proj):
            init_linear(linear, generator)
        for rows in self.tensors_of("BC"):
            rows.mul_(cfg.width_multiple**-0.5)
        if cfg.rescale_prenorm_residual:
            self.out_proj.weight.div_(math.sqrt(cfg.num_hidden_layers))
        for tensor in (self.conv1d.weight, self.conv1d.bias):
            draw_uniform(tensor, 1.0 / math.sqrt(cfg.conv_kernel), generator)
        if cfg.weight_init == "mamba_ssm":
            A = torch.empty(cfg.num_heads).uniform_(1.0, 16.0, generator=generator)
        else:
            A = torch.arange(1.0, cfg.num_heads + 1)
        self.A_log.copy_(A.log())
        self.D.fill_(1.0)
        self.norm.weight.fill_(1.0)

    def tensors_of(self, factor: str) -> tuple[torch.Tensor | None, ...]:
        """What an initialisation of that factor sets, in place (see `mamba2.factors`)."""
        if factor == "BC":
            _, xBC, _ = self.in_proj.weight.split(self.in_proj.widths)
            return xBC.split(conv_widths(self.config))[1:]
        return {
            "A": (self.A_log, self.dt_bias),
            "D": (self.D,),
            "conv": (self.conv1d.weight.squeeze(1), self.conv1d.bias),
            "out_proj": (self.out_proj.weight,),
        }[factor]

    def in_proj_rows(self) -> tuple[int, ...]:
        return self.config.d_inner, *conv_widths(self.config), self.config.num_heads

    def flops_per_token(self, length: int) -> int:
        """Projections, convolution, and the chunked scan (section 6: scores and their product with x within a chunk,
        writing and reading the states). The same for every length."""
        cfg = self.config
        h, q, gn = cfg.num_heads, cfg.chunk_size, cfg.n_groups * cfg.state_size
        projections = 2 * cfg.hidden_size * (cfg.d_in_proj + cfg.d_inner)
        scan = q * gn + q * h * cfg.head_dim + 4 * h * cfg.head_dim * cfg.state_size
        return projections + 2 * cfg.conv_kernel * cfg.conv_dim + scan


def conv_widths(config: Mamba2Config) -> tuple[int, int, int]:
    """Widths of x, B and C, the parts of the convolution's input."""
    bc = config.n_groups * config.state_size
    return config.d_inner, bc, bc


def by_head(
    config: Mamba2Config, x: torch.Tensor, B: torch.Tensor, C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (..., d_inner) -> (..., h, p), B and C (..., g n) -> (..., g, n)."""
    groups = config.n_groups, config.state_size
    return x.unflatten(-1, (config.num_heads, config.head_dim)), B.unflatten(-1, groups), C.unflatten(-1, groups)


def draw_uniform(tensor: torch.Tensor | None, bound: float, generator: torch.Generator) -> None:
    """Fill with U(-bound, bound), drawn on the CPU so that the values do not depend on the device."""
    if tensor is not None:
        tensor.copy_(torch.empty_like(tensor, device="cpu").uniform_(-bound, bound, generator=generator))


def init_linear(linear: nn.Linear, generator: torch.Generator) -> None:
    """PyTorch's default for the weight, U(±1/√fan_in), and zero for the bias."""
    draw_uniform(linear.weight, 1.0 / math.sqrt(linear.in_features), generator)
    if linear.bias is not None:
        linear.bias.zero_()
