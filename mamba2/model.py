"""The language model (Dao & Gu 2024, arXiv:2405.21060): blocks around mixers, embeddings, loss.

    ids -> embeddings -> L × [ residual += x; x = mixer(norm(residual)) ] -> norm_f -> lm_head

Parameter names and shapes are those of `transformers.Mamba2ForCausalLM`, so checkpoints pass both ways.
b batch, l seqlen, d hidden_size, h nheads, v vocab, L layers.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mamba2.attention import AttentionMixer, AttentionState
from mamba2.checkpoint import Shapes, read_model, write_model
from mamba2.checkpoint.hub import fetch
from mamba2.config import Mamba2Config
from mamba2.device import widen
from mamba2.factors import apply_factor, parse_initialization
from mamba2.host_memory import require_memory
from mamba2.initializers import INITIALIZERS, DtParams, make_dt_bias, require_normal, seed_stream
from mamba2.mixer import Mamba2Mixer, MixerState, Parameters, draw_uniform
from mamba2.ops import add_rms_norm, linear_cross_entropy, linear_token_losses
from mamba2.ops.documents import document_numbers

State = MixerState | AttentionState


def build_mixer(config: Mamba2Config, layer: int) -> Mamba2Mixer | AttentionMixer:
    """The mixer of a layer: attention in those that the config names."""
    return AttentionMixer(config) if layer in config.attn_layer_idx else Mamba2Mixer(config)


# What keep_products_only saves for the backward pass: results of matrix products and, on a CPU, of SSD, which consists
# of products there. On a GPU SSD's kernels run again: their result and states would be a quarter of all that is saved.
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
    """Run the block's `function`, save its arguments only (and what `context_fn` says), run it again in backward.

    Raises ValueError in the second run if `functional_call` had replaced the weights, which it would not see, and in
    gradients by `torch.func`, which torch does not support here.
    """
    calls = itertools.count()

    def once(*arguments: object) -> tuple:
        if next(calls):
            raise ValueError(f"a gradient of torch.func.functional_call {NOT_RECOMPUTED}")
        return function(*arguments)

    replaced = not all(isinstance(parameter, nn.Parameter) for parameter in block.parameters())
    try:
        # Nothing in a block is random, and reading the state of a GPU's generator cannot be part of a CUDA graph.
        options = {"use_reentrant": False, "preserve_rng_state": False, **options}
        return checkpoint(once if replaced else function, *arguments, **options)
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        raise ValueError(f"a gradient by torch.func {NOT_RECOMPUTED}") from error


def _refuse_second(grad: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        raise ValueError("create_graph=True does not go with keep_products_only; checkpoint_every does")


class Mamba2Block(nn.Module):
    """Add the last block's output to the residual stream, normalise, mix. The stream itself is never normalised."""

    def __init__(self, config: Mamba2Config, layer: int = 0):
        super().__init__()
        self.eps = config.layer_norm_epsilon
        self.keep_products_only = False
        self.norm = Parameters(config.hidden_size)
        self.mixer = build_mixer(config, layer)

    def forward(
        self,
        x: torch.Tensor,  # (b, l, d) output of the block before
        residual: torch.Tensor | None,  # (b, l, d)
        seq_idx: torch.Tensor | None,
        state: State | None,
        return_state: bool = True,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, State | None]:
        """Returns (output (b, l, d), residual (b, l, d), state)."""
        arguments = x, residual, seq_idx, state, return_state, cu_seqlens
        if self.training and self.keep_products_only:
            results = _recompute(self, self._mix, *arguments, context_fn=_keep_products)
            if results[0].requires_grad and not torch.compiler.is_compiling():
                results[0].register_hook(_refuse_second)
            return results
        return self._mix(*arguments)

    def _mix(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        seq_idx: torch.Tensor | None,
        state: State | None,
        return_state: bool,
        cu_seqlens: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, State | None]:
        normed, residual = add_and_norm(x, residual, self.norm.weight, self.eps)
        x, state = self.mixer(normed, seq_idx, state, return_state, cu_seqlens)
        return x, residual, state

    def step(self, x: torch.Tensor, residual: torch.Tensor | None, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward` for one token, x and residual (b, d), `state` advanced in place."""
        normed, residual = add_and_norm(x, residual, self.norm.weight, self.eps)
        return self.mixer.step(normed, state), residual


class Mamba2Backbone(nn.Module):
    """Embeddings, blocks, last norm: ids (b, l) -> hidden (b, l, d)."""

    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.config = config
        self.embeddings = Parameters(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Mamba2Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm_f = Parameters(config.hidden_size)
        self.checkpoint_every = 0

    def forward(
        self,
        input_ids: torch.Tensor,
        seq_idx: torch.Tensor | None = None,
        state: list[State] | None = None,
        return_state: bool = True,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[State | None]]:
        """Returns hidden (b, l, d) after the last norm, and a list with the state of each layer after the last token.
        Without `return_state` the states are None and are not computed."""
        if cu_seqlens is not None:
            numbers = document_numbers(cu_seqlens, input_ids, seq_idx=seq_idx, state=state)
            if not return_state:  # then these are all that the layers need, made once
                seq_idx, cu_seqlens = numbers, None
        x, residual = self._embed(input_ids), None  # (b, l, d)
        new_state = []
        for i, layer in enumerate(self.layers):
            arguments = x, residual, seq_idx, None if state is None else state[i], return_state, cu_seqlens
            if self.training and self.checkpoint_every and i % self.checkpoint_every == 0:
                x, residual, layer_state = _recompute(layer, layer, *arguments)
            else:
                x, residual, layer_state = layer(*arguments)
            new_state.append(layer_state)
        return add_and_norm(x, residual, self.norm_f.weight, self.config.layer_norm_epsilon)[0], new_state

    def step(self, input_ids: torch.Tensor, state: list[State]) -> torch.Tensor:
        """`forward` for one token per row, (b,): hidden (b, d), `state` advanced in place."""
        x, residual = self._embed(input_ids), None  # (b, d)
        for layer, layer_state in zip(self.layers, state, strict=True):
            x, residual = layer.step(x, residual, layer_state)
        return add_and_norm(x, residual, self.norm_f.weight, self.config.layer_norm_epsilon)[0]

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = embed(input_ids, self.embeddings.weight)
        return x.to(torch.promote_types(x.dtype, torch.float32)) if self.config.residual_in_fp32 else x


class Mamba2LM(nn.Module):
    """Mamba-2 language model.

    Attributes:
        config: the Mamba2Config, which also records how dt_bias was initialised.
        backbone.checkpoint_every: activation checkpointing. 0 keeps all activations; k recomputes every k-th block in
            the backward pass (1: every block), which trades time for memory.
        backbone.layers[i].keep_products_only: save only the results of that block's matrix products; norms,
            convolution and gate, and on a GPU SSD, are computed again in the backward pass. This halves the activations
            for a few percent more time. For blocks that checkpoint_every does not recompute.
    """

    def __init__(
        self,
        config: Mamba2Config,
        seed: int = 0,
        initialization: str = "log_uniform",
        dt_parameters: DtParams | None = None,
    ):
        """Build and initialise. For one config, all weights but dt_bias and the named factors depend on `seed` alone.
        The global generator is not used.

        Arguments: `initialization` is a name from `mamba2.initializers`, or a product with factors of `mamba2.factors`,
        "log_uniform+A=ones"; `dt_parameters` are its parameters, by default the config's time_step_min, time_step_max
        and time_step_floor. On the meta device nothing is initialised.

        Raises MemoryError, before anything is allocated, when the machine cannot hold so many parameters; ValueError
        when a weight would be infinite, nan, or subnormal in float32.
        """
        super().__init__()
        if torch.get_default_device().type == "cpu":
            require_memory(num_parameters(config), torch.get_default_dtype().itemsize)
        self.config = config
        self.backbone = Mamba2Backbone(config)
        self.lm_head = Parameters(config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight
        if not self.lm_head.weight.is_meta:
            name, factors = parse_initialization(initialization)
            if dt_parameters is None:
                dt_parameters = DtParams(config.time_step_min, config.time_step_max, config.time_step_floor)
            self._init_weights(seed)
            self._init_factors(factors, seed, dt_parameters, after_dt_bias=False)
            self.init_dt_bias(name, seed, dt_parameters)
            self._init_factors(factors, seed, dt_parameters, after_dt_bias=True)
            for name, tensor in self.named_parameters():
                require_normal(name, tensor)

    # ------------------------------------------------------------------------------------------------------ computation

    def forward(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        state: list[State] | None = None,
        return_state: bool = False,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, list[State]]:
        """Logits of the next token, or with `targets` the summed loss.

        Arguments:
            input_ids: (b, l) int64 in [0, v); on a CPU an id outside raises ValueError.
            targets: (b, l) int64, the id after each input, -100 where it does not count. The loss is the sum over
                tokens in nats, float32; the whole logits are never in memory at once.
            seq_idx: (b, l) integers; convolution and state restart before each token whose value differs from the
                last one's. `state` belongs to the document of the first token.
            state: the state that an earlier call returned, to continue from; None starts empty.
            return_state: also return the state after the last token, a list with one entry per layer.
            cu_seqlens: (documents + 1,) int32 or int64: 0, then where each document ends, the last one at l, for
                documents one after another in a batch of 1. In place of `seq_idx`, and without `state`. The state
                returned is that after each document, (documents, ...): `step` goes on from there.

        Returns logits (b, l, v), or the loss, and the state if asked for.
        """
        hidden, new_state = self.backbone(input_ids, seq_idx, state, return_state, cu_seqlens)
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
        state: list[State] | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[State]]:
        """Loss of each token, (b, l) float32 in nats, 0 where the target is -100; and the state. No gradient."""
        hidden, new_state = self.backbone(input_ids, seq_idx, state, cu_seqlens=cu_seqlens)
        return linear_token_losses(hidden, self.lm_head.weight, targets), new_state

    @torch.no_grad()
    def prefill(
        self,
        input_ids: torch.Tensor,
        lengths: list[int] | None = None,
        state: list[State] | None = None,
        segment: int = 4096,
    ) -> tuple[torch.Tensor, list[State]]:
        """Read prompts: logits (b, v) of the token after each, and the state after each. No gradient.

        Arguments: input_ids (b, l) int64; `lengths`: prompt length of each row, where they differ; later tokens of the
        row are not read. `state`: to continue from, not changed; None starts empty. `segment`: tokens that go through
        the model at a time, which bounds memory.

        All rows run as one batch up to the end of the shortest prompt, then the others continue: nothing is padded.
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
        ends: list[list[State]] = [None] * b
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
        state = [rows[0].join(rows) for rows in zip(*ends, strict=True)]
        return F.linear(torch.stack(hidden), self.lm_head.weight), state

    @torch.no_grad()
    def step(self, input_ids: torch.Tensor, state: list[State]) -> tuple[torch.Tensor, list[State]]:
        """Decode one token per row, input_ids (b,) int64: logits (b, v) of the next, and `state`, updated in place.

        The same code on every device; time and memory grow with the position only in attention layers.
        `mamba2.decoding` has faster decoders.
        """
        return F.linear(self.backbone.step(input_ids, state), self.lm_head.weight), state

    def new_state(self, batch: int) -> list[State]:
        """The state before the first token of `batch` rows: what `step` and `prefill` can start from."""
        return [layer.mixer.new_state(batch) for layer in self.backbone.layers]

    # --------------------------------------------------------------------------------------------------- initialisation

    @torch.no_grad()
    def _init_weights(self, seed: int) -> None:
        """Draw everything but dt_bias from the stream (seed, "weights"), by the config's `weight_init`."""
        cfg, generator = self.config, seed_stream(seed, "weights")
        embeddings = self.backbone.embeddings.weight
        normal = torch.empty_like(embeddings, device="cpu").normal_(generator=generator)
        embeddings.copy_(normal * cfg.initializer_range)
        for layer in self.backbone.layers:
            layer.mixer.init_parameters(generator)
            layer.norm.weight.fill_(1.0)
        self.backbone.norm_f.weight.fill_(1.0)
        if not cfg.tie_word_embeddings:
            draw_uniform(self.lm_head.weight, (cfg.hidden_size * cfg.width_multiple) ** -0.5, generator)

    def _init_factors(self, factors: dict[str, str], seed: int, parameters: DtParams, after_dt_bias: bool) -> None:
        """Replace the drawn values of each factor by its named choice, and record that in the config: of those that
        read dt_bias, or of the others."""
        records = dict(self.config.factors_init or {}) if after_dt_bias else {}
        for factor, choice in factors.items():
            if INITIALIZERS[factor][choice].after_dt_bias != after_dt_bias:
                continue
            if factor == "embedding":
                tensors = [(self.backbone.embeddings.weight,)]
            else:
                tensors = [mixer.tensors_of(factor) for mixer in self.mixers()]
            records[factor] = apply_factor(factor, choice, seed, tensors, parameters)
        self.config = dataclasses.replace(self.config, factors_init=records or None)

    @torch.no_grad()
    def init_dt_bias(self, initialization: str, seed: int, parameters: DtParams | None = None) -> None:
        """Set every layer's dt_bias by the named initialiser and record in the config what was applied."""
        if parameters is None:
            cfg = self.config
            parameters = DtParams(cfg.time_step_min, cfg.time_step_max, cfg.time_step_floor)
        A = self.A()
        dt_bias, record = make_dt_bias(initialization, tuple(A.shape), A.cpu(), seed, parameters)
        for mixer, values in zip(self.mixers(), dt_bias, strict=True):
            mixer.dt_bias.copy_(values)
        self.config = dataclasses.replace(
            self.config,
            time_step_min=parameters.t_min,
            time_step_max=parameters.t_max,
            time_step_floor=parameters.dt_floor,
            dt_bias_init=record,
        )

    def mixers(self) -> list[Mamba2Mixer]:
        """The mixers of all layers except attention layers."""
        return [layer.mixer for layer in self.backbone.layers if isinstance(layer.mixer, Mamba2Mixer)]

    def dt_bias(self) -> torch.Tensor:
        """dt_bias of every Mamba-2 layer and head, (L, h), detached."""
        return torch.stack([mixer.dt_bias.detach() for mixer in self.mixers()])

    def A(self) -> torch.Tensor:
        """Decay rate |A| of every Mamba-2 layer and head, (L, h) float64, detached: a token's decay is exp(-dt |A|)."""
        return torch.stack([widen(mixer.A_log.detach()).exp() for mixer in self.mixers()])

    # ---------------------------------------------------------------------------------------------------------- storage

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        finite: bool = False,
    ) -> Self:
        """Load a model folder, or OWNER/MODEL from the hub (see `mamba2.checkpoint.read_model` for layouts, errors, and
        what `finite` refuses, and `mamba2.checkpoint.hub`)."""
        config, tensors = read_model(fetch(path), SHAPES, dtype, finite)
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(tensors, strict=True, assign=True)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.backbone.embeddings.weight
        return model.to(device)

    def save_pretrained(self, path: str | os.PathLike) -> Path:
        """Write model.safetensors (float32), config.json and the model card README.md into the folder `path`; each file
        is written atomically."""
        return write_model(path, self.config, self.state_dict())


def tensor_shapes(config: Mamba2Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model, lm_head included when tied; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Mamba2LM(config).state_dict().items()}


def num_parameters(config: Mamba2Config) -> int:
    """Exact number of parameters, tied embeddings counted once. Builds one Mamba-2 block only, on the meta device."""
    attention = config.attn_layer_idx
    other = next(layer for layer in itertools.count() if layer not in attention)
    tables = 1 if config.tie_word_embeddings else 2
    total = (tables * config.vocab_size + 1) * config.hidden_size
    with torch.device("meta"):
        for layer, count in ((other, config.num_hidden_layers - len(attention)), *((i, 1) for i in attention)):
            total += count * sum(p.numel() for p in Mamba2Block(config, layer).parameters())
    return total


SHAPES = Shapes(tensor_shapes, num_parameters)


def flops_per_token(config: Mamba2Config, length: int) -> int:
    """Floating-point operations per token of one training step on windows of `length`, forward and backward
    (3 × forward), for MFU. Counts the mixers and the logits; recomputation does not count."""
    with torch.device("meta"):
        mixers = [layer.mixer for layer in Mamba2Backbone(config).layers]
    return 3 * (sum(m.flops_per_token(length) for m in mixers) + 2 * config.hidden_size * config.vocab_size)


def check_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Raise ValueError naming an id outside [0, vocab_size)."""
    low, high = (int(bound) for bound in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"the id {wrong} is outside the model's vocabulary of {vocab_size}")


def embed(input_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows of `weight` (v, d). Raises ValueError if ids are no integers, and on a CPU for an id outside [0, v)."""
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"ids must be integers, not {input_ids.dtype}")
    try:
        return F.embedding(input_ids, weight)
    except IndexError:
        check_ids(input_ids, len(weight))
        raise


def add_and_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x + residual, in autocast's dtype if autocast is on, else in the weight's; and the sum."""
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return add_rms_norm(x, residual, weight, eps, dtype)
