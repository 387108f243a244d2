"""Mamba-2 (Dao & Gu 2024, arXiv:2405.21060): mixer, block, language model.

    ids -> embeddings -> L × [ residual += x; x = mixer(norm(residual)) ] -> norm_f -> lm_head

Parameter names and shapes are those of `transformers.Mamba2ForCausalLM`, so checkpoints pass both ways.
d_inner = h p; b batch, l seqlen, d hidden_size, h nheads, p headdim, g ngroups, n d_state, K conv_kernel, v vocab.
"""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mamba2.checkpoint import read_model, write_model
from mamba2.config import Mamba2Config
from mamba2.host_memory import require_memory
from mamba2.initializers import DtParams, make_dt_bias, require_normal, seed_stream
from mamba2.ops import (
    add_rms_norm,
    causal_conv1d,
    causal_conv1d_step,
    gated_rms_norm,
    linear_cross_entropy,
    linear_token_losses,
    ssd,
    ssd_step,
)


class MixerState(NamedTuple):
    """All that one mixer remembers of the tokens so far."""

    conv: torch.Tensor  # (b, K - 1, d_inner + 2 g n), the last inputs of the convolution
    ssm: torch.Tensor  # (b, h, p, n), float32

    def detach(self) -> Self:
        """The same values, through which no gradient flows back: truncated back-propagation through time."""
        return MixerState(self.conv.detach(), self.ssm.detach())

    def rows(self, index: list[int] | slice) -> Self:
        """A copy of some rows of the batch, in the order of `index`: any row may occur any number of times."""
        return MixerState(self.conv[index].clone(), self.ssm[index].clone())


class Parameters(nn.Module):
    """A weight, and perhaps a bias, under the names that checkpoints use; the arithmetic is in `mamba2.ops`."""

    def __init__(self, *shape: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[0])) if bias else None


class Linear(nn.Linear):
    """torch's, without its own draw from the global generator: Mamba2LM draws all weights."""

    def reset_parameters(self) -> None:
        pass


# For the backward pass: keeps results of products and, on a processor, of SSD, which is made of products there. SSD's
# kernels run again: their result and the states that they keep would be a quarter of all that is kept.
_keep_products = functools.partial(
    create_selective_checkpoint_contexts,
    [
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.mamba2.ssd_blocked_forward.default,
    ],
)


NOT_RECOMPUTED = "does not go with keep_products_only or checkpoint_every: turn them off, or call model.eval()"


def _recompute(block: nn.Module, function: Callable, *arguments: object, **options: object) -> tuple:
    """Run the block's `function` and keep its arguments alone; run it again in the backward pass.

    Raises ValueError where that would be with other weights, those that `functional_call` had replaced, or where torch
    does not have it.
    """
    calls = itertools.count()

    def once(*arguments: object) -> tuple:
        if next(calls):
            raise ValueError(f"a gradient of torch.func.functional_call {NOT_RECOMPUTED}")
        return function(*arguments)

    replaced = not all(isinstance(parameter, nn.Parameter) for parameter in block.parameters())
    try:
        # Nothing in a block is random; asking a GPU's generator for its state would not go into a CUDA graph.
        options = {"use_reentrant": False, "preserve_rng_state": False, **options}
        return checkpoint(once if replaced else function, *arguments, **options)
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        raise ValueError(f"a gradient by torch.func {NOT_RECOMPUTED}") from error


def _refuse_second(grad: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        raise ValueError("create_graph=True does not go with keep_products_only; checkpoint_every does")


class SplitLinear(Linear):
    """One weight whose result comes in pieces (..., width), each a product of its own.

    Split after one product, the gradients of the pieces would be joined again before its backward: twice the width of
    all pieces, read and written for every token.
    """

    def __init__(self, in_features: int, widths: tuple[int, ...], bias: bool):
        super().__init__(in_features, sum(widths), bias)
        self.widths = widths

    def forward(self, u: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights = self.weight.split(self.widths)
        biases = (None,) * len(weights) if self.bias is None else self.bias.split(self.widths)
        return tuple(F.linear(u, weight, bias) for weight, bias in zip(weights, biases))


class Mamba2Mixer(nn.Module):
    """Projection in, causal convolution, SSD, gated norm, projection out: (b, l, d) -> (b, l, d)."""

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
    ) -> tuple[torch.Tensor, MixerState | None]:
        """Mix u (b, l, d) along the sequence, starting from `state` (zeros if None). Returns (b, l, d), new state."""
        cfg = self.config
        z, xBC, dt = self.in_proj(u)  # (b, l, d_inner), (b, l, d_inner + 2 g n), (b, l, h)
        y, state = self.scan(xBC, dt, seq_idx, state, return_state)
        # Each group is normalised by itself, in training and evaluation alike.
        y = gated_rms_norm(y, z, self.norm.weight, cfg.layer_norm_epsilon, ngroups=cfg.n_groups)
        return self.out_proj(y), state

    def scan(
        self,
        xBC: torch.Tensor,  # (b, l, d_inner + 2 g n)
        dt: torch.Tensor,  # (b, l, h)
        seq_idx: torch.Tensor | None,
        state: MixerState | None,
        return_state: bool,
    ) -> tuple[torch.Tensor, MixerState | None]:
        """All that looks along the sequence: convolution and SSD. Returns (b, l, d_inner), new state or None."""
        cfg = self.config
        bc = cfg.n_groups * cfg.state_size
        pieces = causal_conv1d(
            xBC,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            seq_idx=seq_idx,
            initial_state=None if state is None else state.conv,
            return_final_state=return_state,
            splits=(cfg.d_inner, bc, bc),
        )
        (x, B, C), conv_state = pieces if return_state else (pieces, None)  # (b, l, d_inner), (b, l, g n) twice
        y = ssd(
            x.unflatten(-1, (cfg.num_heads, cfg.head_dim)),  # (b, l, h, p)
            dt,  # (b, l, h)
            -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp(),  # (h,)
            B.unflatten(-1, (cfg.n_groups, cfg.state_size)),  # (b, l, g, n)
            C.unflatten(-1, (cfg.n_groups, cfg.state_size)),
            cfg.chunk_size,
            D=self.D,
            dt_bias=self.dt_bias,
            initial_states=None if state is None else state.ssm,
            seq_idx=seq_idx,
            dt_softplus=True,
            dt_limit=cfg.time_step_limit,
            return_final_states=return_state,
        )
        if not return_state:
            return y.flatten(-2), None
        return y[0].flatten(-2), MixerState(conv_state, y[1])

    def step(self, u: torch.Tensor, state: MixerState) -> torch.Tensor:
        """`forward` for one token: u (b, d) -> (b, d), `state` advanced in place."""
        cfg = self.config
        bc = cfg.n_groups * cfg.state_size
        z, xBC, dt = self.in_proj(u)  # (b, d_inner), (b, d_inner + 2 g n), (b, h)
        xBC = causal_conv1d_step(state.conv, xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias)
        x, B, C = xBC.split([cfg.d_inner, bc, bc], dim=-1)
        y = ssd_step(
            state.ssm,
            x.unflatten(-1, (cfg.num_heads, cfg.head_dim)),  # (b, h, p)
            dt,  # (b, h)
            -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp(),  # (h,)
            B.unflatten(-1, (cfg.n_groups, cfg.state_size)),  # (b, g, n)
            C.unflatten(-1, (cfg.n_groups, cfg.state_size)),
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=cfg.time_step_limit,
        )
        y = gated_rms_norm(y.flatten(-2), z, self.norm.weight, cfg.layer_norm_epsilon, ngroups=cfg.n_groups)
        return self.out_proj(y)


class Mamba2Block(nn.Module):
    """Add the last block's output to the residual stream, normalise, mix. The stream itself is never normalised."""

    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.eps = config.layer_norm_epsilon
        self.keep_products_only = False
        self.norm = Parameters(config.hidden_size)
        self.mixer = Mamba2Mixer(config)

    def forward(
        self,
        x: torch.Tensor,  # (b, l, d) output of the block before
        residual: torch.Tensor | None,  # (b, l, d)
        seq_idx: torch.Tensor | None,
        state: MixerState | None,
        return_state: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, MixerState | None]:
        """Returns (output (b, l, d), residual (b, l, d), state)."""
        if self.training and self.keep_products_only:
            arguments = x, residual, seq_idx, state, return_state
            results = _recompute(self, self._mix, *arguments, context_fn=_keep_products)
            if results[0].requires_grad and not torch.compiler.is_compiling():
                results[0].register_hook(_refuse_second)
            return results
        return self._mix(x, residual, seq_idx, state, return_state)

    def _mix(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        seq_idx: torch.Tensor | None,
        state: MixerState | None,
        return_state: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, MixerState | None]:
        dtype = _compute_dtype(self.norm.weight)
        normed, residual = add_rms_norm(x, residual, self.norm.weight, self.eps, dtype)
        x, state = self.mixer(normed, seq_idx, state, return_state)
        return x, residual, state

    def step(
        self, x: torch.Tensor, residual: torch.Tensor | None, state: MixerState
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward` for one token, x and residual (b, d), `state` advanced in place."""
        dtype = _compute_dtype(self.norm.weight)
        normed, residual = add_rms_norm(x, residual, self.norm.weight, self.eps, dtype)
        return self.mixer.step(normed, state), residual


class Mamba2Backbone(nn.Module):
    """Embeddings, blocks, last norm: ids (b, l) -> hidden (b, l, d)."""

    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.config = config
        self.embeddings = Parameters(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Mamba2Block(config) for _ in range(config.num_hidden_layers))
        self.norm_f = Parameters(config.hidden_size)
        self.checkpoint_every = 0

    def forward(
        self,
        input_ids: torch.Tensor,
        seq_idx: torch.Tensor | None = None,
        state: list[MixerState] | None = None,
        return_state: bool = True,
    ) -> tuple[torch.Tensor, list[MixerState | None]]:
        """Returns hidden (b, l, d) after the last norm, and the state of each layer after the last token, which costs
        something: without `return_state` it is None."""
        x = embed(input_ids, self.embeddings.weight)  # (b, l, d)
        if self.config.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        residual = None
        new_state = []
        for i, layer in enumerate(self.layers):
            layer_state = None if state is None else state[i]
            if self.training and self.checkpoint_every and i % self.checkpoint_every == 0:
                arguments = x, residual, seq_idx, layer_state, return_state
                x, residual, layer_state = _recompute(layer, layer, *arguments)
            else:
                x, residual, layer_state = layer(x, residual, seq_idx, layer_state, return_state)
            new_state.append(layer_state)
        eps = self.config.layer_norm_epsilon
        hidden, _ = add_rms_norm(x, residual, self.norm_f.weight, eps, _compute_dtype(self.norm_f.weight))
        return hidden, new_state

    def step(self, input_ids: torch.Tensor, state: list[MixerState]) -> torch.Tensor:
        """`forward` for one token per row, (b,): hidden (b, d), `state` advanced in place."""
        x = embed(input_ids, self.embeddings.weight)  # (b, d)
        if self.config.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        residual = None
        for layer, layer_state in zip(self.layers, state, strict=True):
            x, residual = layer.step(x, residual, layer_state)
        eps = self.config.layer_norm_epsilon
        return add_rms_norm(x, residual, self.norm_f.weight, eps, _compute_dtype(self.norm_f.weight))[0]


class Mamba2LM(nn.Module):
    """Mamba-2 language model.

    Attributes:
        config: the Mamba2Config, which also records how dt_bias was initialised.
        backbone.checkpoint_every: activation checkpointing. 0 keeps all activations; k recomputes every k-th block in
            the backward pass (1: every block), which trades time for memory.
        backbone.layers[i].keep_products_only: keep the results of that block's products alone and compute norms,
            convolution and gate, and on a GPU SSD, again in the backward pass: half of the activations, for a few
            percent of the time. For blocks that checkpoint_every leaves alone.
    """

    def __init__(
        self,
        config: Mamba2Config,
        seed: int = 0,
        initialization: str = "log_uniform",
        dt_parameters: DtParams | None = None,
    ):
        """Build and initialise. All weights but dt_bias depend on `seed` alone, never on the global generator.

        Arguments: `initialization` is a name from `mamba2.initializers`; `dt_parameters` are its parameters, by default
        the config's time_step_min, time_step_max and time_step_floor. On the meta device nothing is initialised.

        Raises MemoryError, before anything is allocated, when the machine cannot hold so many parameters; ValueError
        when a weight would be no normal number of its dtype.
        """
        super().__init__()
        if torch.get_default_device().type == "cpu":
            require_memory(config.num_parameters(), torch.get_default_dtype().itemsize)
        self.config = config
        self.backbone = Mamba2Backbone(config)
        self.lm_head = Parameters(config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight
        if not self.lm_head.weight.is_meta:
            self._init_weights(seed)
            self.init_dt_bias(initialization, seed, dt_parameters)
            for name, tensor in self.named_parameters():
                require_normal(name, tensor)

    # ------------------------------------------------------------------------------------------------------ computation

    def forward(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        state: list[MixerState] | None = None,
        return_state: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, list[MixerState]]:
        """Logits of the next token, or with `targets` the summed loss.

        Arguments:
            input_ids: (b, l) int64 in [0, v); on a processor ValueError names one that is not.
            targets: (b, l) int64, the id after each input, -100 where it does not count. The loss is the sum over
                tokens in nats, float32; the logits are never held whole.
            seq_idx: (b, l) integers; convolution and state restart before each token whose value differs from the
                last one's. `state` belongs to the document of the first token.
            state: what an earlier call returned, to go on from there; None starts empty.
            return_state: also return the state after the last token, a list with one MixerState per layer.

        Returns logits (b, l, v), or the loss, and the state if asked for.
        """
        hidden, new_state = self.backbone(input_ids, seq_idx, state, return_state)
        if targets is None:
            result = F.linear(hidden, self.lm_head.weight)
        else:
            result = linear_cross_entropy(hidden, self.lm_head.weight, targets)
        return (result, new_state) if return_state else result

    @torch.no_grad()
    def token_losses(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor,
        seq_idx: torch.Tensor | None = None,
        state: list[MixerState] | None = None,
    ) -> tuple[torch.Tensor, list[MixerState]]:
        """Loss of each token, (b, l) float32 in nats, 0 where the target is -100; and the state. No gradient."""
        hidden, new_state = self.backbone(input_ids, seq_idx, state)
        return linear_token_losses(hidden, self.lm_head.weight, targets), new_state

    @torch.no_grad()
    def prefill(
        self,
        input_ids: torch.Tensor,
        lengths: list[int] | None = None,
        state: list[MixerState] | None = None,
        segment: int = 4096,
    ) -> tuple[torch.Tensor, list[MixerState]]:
        """Read prompts: logits (b, v) of the token after each, and the state after each. No gradient.

        Arguments: input_ids (b, l) int64; lengths: tokens of each row that are its prompt, where they differ; what lies
        beyond is never read. `state`: to go on from, left as it is; None starts empty. `segment`: tokens that go
        through the model at a time, which bounds memory.

        Rows run side by side up to the end of the shortest, then the others go on: nothing is padded.
        Raises ValueError naming an id outside the vocabulary, or lengths that do not fit.
        """
        b, l = input_ids.shape
        lengths = [l] * b if lengths is None else [int(length) for length in lengths]
        if l == 0 or len(lengths) != b or not all(1 <= length <= l for length in lengths):
            raise ValueError(
                f"lengths must be {b} numbers from 1 to {l}, one for each row of the prompts, not {lengths}"
            )
        active = list(range(b))  # rows that have not ended
        hidden: list[torch.Tensor] = [None] * b
        ends: list[list[MixerState]] = [None] * b
        start = 0
        for end in sorted(set(lengths)):
            for first in range(start, end, segment):
                ids = input_ids[active, first : min(first + segment, end)]
                check_ids(ids, self.config.vocab_size)
                last, state = self.backbone(ids, state=state)
            for place, row in enumerate(active):
                if lengths[row] == end:
                    hidden[row] = last[place, -1]
                    ends[row] = [s.rows(slice(place, place + 1)) for s in state]
            going = [place for place, row in enumerate(active) if lengths[row] > end]
            state = [s.rows(going) for s in state]
            active, start = [active[place] for place in going], end
        layers = zip(*ends, strict=True)
        state = [MixerState(*(torch.cat(parts) for parts in zip(*rows, strict=True))) for rows in layers]
        return F.linear(torch.stack(hidden), self.lm_head.weight), state

    @torch.no_grad()
    def step(self, input_ids: torch.Tensor, state: list[MixerState]) -> tuple[torch.Tensor, list[MixerState]]:
        """One token per row, (b,) int64: logits (b, v) of the next, and `state`, which is advanced in place.

        The same on every device, in constant time and memory. `mamba2.decoder` is faster on a processor.
        """
        return F.linear(self.backbone.step(input_ids, state), self.lm_head.weight), state

    # --------------------------------------------------------------------------------------------------- initialisation

    @torch.no_grad()
    def _init_weights(self, seed: int) -> None:
        """Draw everything but dt_bias from the stream (seed, "weights"), by the config's `weight_init`."""
        cfg, generator = self.config, seed_stream(seed, "weights")

        def uniform(tensor: torch.Tensor | None, bound: float) -> None:
            if tensor is not None:
                tensor.copy_(torch.empty_like(tensor, device="cpu").uniform_(-bound, bound, generator=generator))

        embeddings = self.backbone.embeddings.weight
        normal = torch.empty_like(embeddings, device="cpu").normal_(generator=generator)
        embeddings.copy_(normal * cfg.initializer_range)
        for layer in self.backbone.layers:
            mixer = layer.mixer
            for linear in (mixer.in_proj, mixer.out_proj):
                uniform(linear.weight, 1.0 / math.sqrt(linear.in_features))
                if linear.bias is not None:
                    linear.bias.zero_()
            if cfg.rescale_prenorm_residual:
                mixer.out_proj.weight.div_(math.sqrt(cfg.num_hidden_layers))
            uniform(mixer.conv1d.weight, 1.0 / math.sqrt(cfg.conv_kernel))
            uniform(mixer.conv1d.bias, 1.0 / math.sqrt(cfg.conv_kernel))
            if cfg.weight_init == "mamba_ssm":
                A = torch.empty(cfg.num_heads).uniform_(1.0, 16.0, generator=generator)
            else:
                A = torch.arange(1.0, cfg.num_heads + 1)
            mixer.A_log.copy_(A.log())
            mixer.D.fill_(1.0)
            mixer.norm.weight.fill_(1.0)
            layer.norm.weight.fill_(1.0)
        self.backbone.norm_f.weight.fill_(1.0)
        if not cfg.tie_word_embeddings:
            uniform(self.lm_head.weight, 1.0 / math.sqrt(cfg.hidden_size))

    @torch.no_grad()
    def init_dt_bias(self, initialization: str, seed: int, parameters: DtParams | None = None) -> None:
        """Set every layer's dt_bias by the named initialiser and record in the config what was applied."""
        if parameters is None:
            cfg = self.config
            parameters = DtParams(cfg.time_step_min, cfg.time_step_max, cfg.time_step_floor)
        A = self.A()
        dt_bias, record = make_dt_bias(initialization, tuple(A.shape), A.cpu(), seed, parameters)
        for layer, values in zip(self.backbone.layers, dt_bias, strict=True):
            layer.mixer.dt_bias.copy_(values)
        self.config = dataclasses.replace(
            self.config,
            time_step_min=parameters.t_min,
            time_step_max=parameters.t_max,
            time_step_floor=parameters.dt_floor,
            dt_bias_init=record,
        )

    def dt_bias(self) -> torch.Tensor:
        """dt_bias of every layer and head, (L, h), detached."""
        return torch.stack([layer.mixer.dt_bias.detach() for layer in self.backbone.layers])

    def A(self) -> torch.Tensor:
        """Decay rate |A| of every layer and head, (L, h) float64, detached: a token's decay is exp(-dt |A|)."""
        return torch.stack([layer.mixer.A_log.detach().double().exp() for layer in self.backbone.layers])

    # ---------------------------------------------------------------------------------------------------------- storage

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        finite: bool = False,
    ) -> Self:
        """Load a model folder (see `mamba2.checkpoint.read_model` for layouts, errors, and what `finite` refuses)."""
        config, tensors = read_model(path, dtype, finite)
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(tensors, strict=True, assign=True)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.backbone.embeddings.weight
        return model.to(device)

    def save_pretrained(self, path: str | os.PathLike) -> Path:
        """Write model.safetensors (float32) and config.json into the folder `path`; each file appears whole or not."""
        return write_model(path, self.config, self.state_dict())


def check_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Raise ValueError naming an id that is none."""
    low, high = (int(bound) for bound in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"the id {wrong} is outside the model's vocabulary of {vocab_size}")


def embed(input_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows of `weight` (v, d). Raises ValueError naming an id that has none, on a processor; a GPU cannot tell."""
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"ids must be integers, not {input_ids.dtype}")
    try:
        return F.embedding(input_ids, weight)
    except IndexError:
        check_ids(input_ids, len(weight))
        raise


def _compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """Dtype that activations are handed on in: autocast's where it is on, else the weights'."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
