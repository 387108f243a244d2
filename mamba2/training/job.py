"""One model in training: load it or resume it, train it step by step, evaluate, sample and save it."""

import argparse
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import torch

from mamba2.checkpoint import weights_sha256, write_model
from mamba2.checkpoint.training_state import (
    load_optimizer,
    load_rng,
    rng_tensors,
    save_optimizer,
    save_rng,
    sort_headers,
)
from mamba2.cuda_graph import GraphGradients
from mamba2.data import Tokens, Windows, describe, load_tokens, load_validation
from mamba2.data.tokens import SIDECAR
from mamba2.distributed import World, full, parallelize, reshard
from mamba2.generate import NoDistribution, generate
from mamba2.initializers import dt_table
from mamba2.model import Mamba2LM, flops_per_token, num_parameters
from mamba2.ops.fusion import fuse, require_cxx_compiler
from mamba2.tokenizer import find_tokenizer, save_tokenizer
from mamba2.training.hardware import (
    autocast,
    choose_dtype,
    explain_out_of_memory,
    memory_estimate,
    memory_used,
    peak_flops,
    versions,
)
from mamba2.training.initial_state import InitialStates
from mamba2.training.metrics import Progress
from mamba2.training.optimizer import Schedule, make_optimizer
from mamba2.training.step import accumulate_gradients, add_gradients, mean_loss, update

# Options that must not change when a run is resumed. How a step is split into micro-batches, and what is logged and
# saved, may change. Schedules are compared by their rates up to the step of the checkpoint.
SAME_ON_RESUME = (
    *("learning_rate", "weight_decay", "decay", "betas", "eps", "clip", "max_length", "no_reset", "seed"),
    *("eval_windows", "optimizer", "dt_lr", "A_lr", "initial_state"),
)
BEFORE = {
    "optimizer": "adamw",
    "dt_lr": 1.0,
    "A_lr": 1.0,
    "initial_state": "zero",
}  # of checkpoints older than the option


@dataclasses.dataclass
class Counters:
    """The counters of a run after `step` steps; a checkpoint stores them."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0

    @property
    def updates(self) -> int:
        """Steps that changed the model."""
        return self.step - self.skipped

    def trained(self, tokens: int, skipped: bool) -> None:
        self.step += 1
        self.tokens += tokens
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    def evaluated(self, loss: float) -> bool:
        """Record an evaluation. Returns whether its loss is the best so far."""
        is_best = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        self.evaluations_since_best += 1
        if is_best:
            self.best_loss, self.best_step, self.evaluations_since_best = loss, self.step, 0
        return is_best


class Job:
    """A model, its data and what follows from the options. Creating one writes no file."""

    def __init__(self, model_path: Path, args: argparse.Namespace, world: World):
        self.args, self.model_path, self.world = args, model_path, world
        torch.manual_seed(args.seed)
        self.device = world.device
        self.dtype = choose_dtype(args.dtype, self.device)
        if args.compile == "graph" and (self.device.type != "cuda" or world.size > 1):
            place = f"on {self.device.type}, in {world.size} process{'es' if world.size > 1 else ''}"
            raise ValueError(f"--compile graph records what one GPU does in one process, and this runs {place}")
        if args.compile == "graph" and args.initial_state != "zero":
            raise ValueError(
                f"--compile graph records a step from empty states; --initial-state is {args.initial_state}"
            )
        self.sharded = args.parallel == "fsdp"
        self.model = self._load(model_path)
        self.config = self.model.config
        self.flops = flops_per_token(self.config, args.max_length)
        self.tokenizer = find_tokenizer(model_path)  # None: the data are token ids already

        self.train_tokens, self.validation_tokens = world.in_turn_on_a_node(
            lambda: (
                load_tokens(args.dataset_path, "train", self.tokenizer),
                load_validation(args.dataset_path, self.tokenizer),
            )
        )
        for tokens in (self.train_tokens, self.validation_tokens):
            if tokens is not None:
                tokens.check_vocabulary(self.config.vocab_size)
        windows = functools.partial(Windows, length=args.max_length, reset=not args.no_reset)
        self.windows = windows(self.train_tokens)
        self.validation = self.validation_tokens and windows(self.validation_tokens)
        if args.initial_state != "zero" and self.train_tokens.sample_length:
            raise ValueError(
                f"--initial-state {args.initial_state} has no effect on {args.dataset_path}: each sample starts empty"
            )
        if args.patience is not None and self.validation is None:
            raise ValueError(
                f"--patience {args.patience} needs evaluations, and {args.dataset_path} has no validation split"
            )

        self.batch = args.batch_size * args.gradient_accumulation_steps
        self.samples = round(args.num_epochs * len(self.windows))
        if args.max_steps is not None:
            self.samples = args.max_steps * self.batch
        self.steps = steps = max(1, -(-self.samples // self.batch))
        warmup = math.ceil(args.warmup_ratio * steps) if args.warmup_steps is None else args.warmup_steps
        decay = math.ceil(args.decay_ratio * steps)
        self.schedule = Schedule(args.schedule, steps, warmup, decay, args.final_rate_ratio, args.warmup_from_zero)

    def _load(self, folder: Path) -> Mamba2LM:
        # FSDP moves the model to the device block by block.
        return Mamba2LM.from_pretrained(folder, "cpu" if self.sharded else self.device, finite=True)

    def build(self, checkpoint: Path | None, counters: Counters | None = None) -> None:
        """Prepare model, optimizer and generators to train from the start, or from `checkpoint`."""
        self.counters = counters or Counters()
        args, every = self.args, self.args.checkpoint_every
        if checkpoint is not None:
            self.model = self._load(checkpoint)
        self.model.backbone.checkpoint_every = every
        for i, layer in enumerate(self.model.backbone.layers):
            layer.keep_products_only = args.keep_products_only and (every == 0 or i % every != 0)
        if args.compile != "off" and self.device.type == "cpu":
            require_cxx_compiler()
        fuse(args.compile == "fused")
        if args.compile == "model":
            self.model.compile()
        elif args.compile == "blocks":
            for layer in self.model.backbone.layers:
                layer.compile()
        self.add = None
        if args.compile == "graph":
            add = functools.partial(add_gradients, self.model, self.dtype, self.world.size)
            self.add = GraphGradients(self.model, add)
        self.parallel_model = parallelize(self.model, self.world, args.parallel, self.dtype)
        self.optimizer = make_optimizer(
            self.model,
            args.learning_rate,
            tuple(args.betas),
            args.weight_decay,
            args.eps,
            args.decay,
            args.optimizer,
            {"dt": args.dt_lr, "A": args.A_lr},
        )
        self.states = None
        if args.initial_state != "zero":
            self.states = InitialStates(args.initial_state, self.model, self.batch, args.seed, self.world, self.device)
        if checkpoint is not None:
            load_optimizer(checkpoint, self.model, self.optimizer, self.counters.updates)
            load_rng(checkpoint, self.world.rank)
            if self.states:
                self.states.load(checkpoint)
        self.model.train()

    # ------------------------------------------------------------------------------------ train, evaluate, sample, save

    def step(self, step: int) -> dict[str, Any]:
        """Make update number `step`, counted from 0. Returns loss, rate, gradient norm (None: skipped) and tokens."""
        args, factor = self.args, self.schedule.factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        if args.initial_state == "continued":
            indices, anew = self.windows.streams(args.seed, step, self.batch)
        else:
            indices, anew = self.windows.indices(args.seed, step, self.batch), [False] * self.batch
        indices = indices[: self.samples - step * self.batch]
        if self.states:
            empty = [first or self.windows.begins_document(index) for index, first in zip(indices, anew)]
            self.states.begin(step, empty)
        with explain_out_of_memory(
            args.batch_size, args.max_length, args.gradient_accumulation_steps, args.checkpoint_every
        ):
            loss, tokens = accumulate_gradients(
                self.parallel_model,
                self.windows,
                indices,
                args.batch_size,
                self.dtype,
                self.world,
                self.add,
                self.states,
            )
            norm = update(self.model, self.optimizer, args.clip, keep_gradients=self.add is not None)
        if norm is None and self.states:
            self.states.clear()
        return {"loss": loss, "learning_rate": args.learning_rate * factor, "gradient_norm": norm, "tokens": tokens}

    def evaluate(self) -> float:
        args = self.args
        return mean_loss(self.model, self.validation, args.eval_windows, args.batch_size, self.dtype, self.world)

    def dt(self) -> tuple[torch.Tensor, torch.Tensor]:
        """dt_bias and A, (L, h) each."""
        return full(self.model.dt_bias()), full(self.model.A())

    def sample(self) -> str | None:
        """Text generated from end-of-text, with the same random numbers at every call; None if the logits are not
        finite."""
        generator = torch.Generator(self.device).manual_seed(self.args.seed)
        start = torch.tensor([[self.tokenizer.eot_id]], device=self.device)
        try:
            with autocast(self.device, self.dtype):
                ids = generate(self.model, start, self.args.sample_tokens, temperature=0.8, generator=generator)[0, 1:]
        except NoDistribution:
            return None
        finally:
            reshard(self.model)
        # The model's vocabulary may be padded beyond the tokenizer's.
        return self.tokenizer.decode([i for i in ids.tolist() if i < self.tokenizer.vocab_size])

    def write_model(self, folder: Path) -> None:
        """Write the model folder, with the whole weights in one file even if they are sharded."""
        tensors = {}
        for name, tensor in self.model.state_dict().items():
            whole = full(tensor)
            if self.world.is_main:
                tensors[name] = whole.cpu()

        def write() -> None:
            write_model(folder, self.config, tensors, facts=self.facts())
            if self.tokenizer is not None:
                save_tokenizer(self.tokenizer, folder)

        self.world.first(write)

    def facts(self) -> dict[str, str]:
        """What the model card says of the training so far."""
        data, trained, done = self.args.dataset_path, self.train_tokens, self.counters
        name = Path(data).name if Path(data).exists() else data
        facts = {
            "tokenizer": self.tokenizer.name if self.tokenizer else "none",
            "data": f"{name}, {len(trained.ids):,} tokens (sha256 {trained.sha256[:16]})",
            "training": f"{done.step:,} steps, {done.tokens:,} tokens in windows of {self.args.max_length}",
        }
        if done.best_loss is not None:
            facts["lowest held-out loss"] = f"{done.best_loss:.4f} nats per token, at step {done.best_step:,}"
        return facts

    def write_checkpoint(self, folder: Path) -> None:
        self.write_model(folder)
        if self.sharded:
            save_optimizer(folder, self.model, self.optimizer)
            self.world.first(lambda: sort_headers(folder))
        else:
            self.world.first(lambda: save_optimizer(folder, self.model, self.optimizer))
        if self.states:
            self.states.save(folder)
        generators = self.world.gather(rng_tensors())
        self.world.first(lambda: save_rng(folder, generators))

    # -------------------------------------------------------------------------------------------- identity, description

    def identity(self) -> dict[str, Any]:
        """What must be the same when a run is resumed."""
        return {
            **{name: getattr(self.args, name) for name in SAME_ON_RESUME},
            "dtype": str(self.dtype).removeprefix("torch."),
            "windows per step": self.batch,
            "weights in --model-path (sha256)": weights_sha256(self.model_path),
            "config in --model-path": self.config.to_dict(),
            "tokenizer": self.tokenizer and self.tokenizer.identity,
            "training data (sha256)": self.train_tokens.sha256,
            "validation data (sha256)": self.validation_tokens and self.validation_tokens.sha256,
        }

    def check_same(self, checkpoint: Path, state: dict[str, Any], identity: dict[str, Any]) -> None:
        """Raise ValueError naming what differs from the run that wrote `checkpoint`."""
        before = BEFORE | state["identity"]
        different = [
            f"{name if ' ' in name else '--' + name.replace('_', '-')} was {before.get(name)!r} and is {value!r}"
            for name, value in identity.items()
            if before.get(name) != value
        ]
        step, schedule = state["counters"]["step"], Schedule(**state["schedule"])
        if not schedule.same_until(self.schedule, step) or step > self.steps:
            old, new = dataclasses.asdict(schedule), dataclasses.asdict(self.schedule)
            changes = [f"{name} was {old[name]} and is {new[name]}" for name in old if old[name] != new[name]]
            different.append(f"the learning rates of the steps so far differ ({', '.join(changes)})")
        elif min(state["samples"], step * self.batch) != min(self.samples, step * self.batch):
            different.append(f"the last step had fewer windows (of {state['samples']}, and now {self.samples})")
        if different:
            raise ValueError(
                f"{checkpoint} belongs to another run: {'; '.join(different)}. Restore that, choose another "
                "--output-dir, or begin anew with --overwrite"
            )

    def describe(self, output: Path) -> None:
        """Print, on rank 0, the size of the run and the dt of every layer."""
        dt_bias, A = self.dt()
        if not self.world.is_main:
            return
        args, tokens = self.args, self.steps * self.batch * self.args.max_length
        train, held_out = self.train_tokens, self.validation_tokens
        sources = {"train": train.source, "held out": held_out and held_out.source}
        flops = tokens * self.flops
        memory = memory_estimate(
            self.config,
            args.batch_size,
            args.max_length,
            self.dtype,
            args.checkpoint_every,
            args.keep_products_only,
            shards=self.world.size if self.sharded else 1,
        )
        print(f"\n{self.model_path} -> {output}")
        print(f"parameters   {num_parameters(self.config):,}")
        print(f"data         {args.dataset_path}: {_counted(train)}")
        print(f"             {f'{_counted(held_out)} held out' if held_out else 'no validation split'}")
        for line in describe({name: source for name, source in sources.items() if source}):
            print(line)
        if train.source is None and (Path(args.dataset_path) / SIDECAR).is_file():
            print(f"             {SIDECAR} does not say of which files; what python -m mamba2.data writes now does")
        print(f"step         {self.batch} windows of {args.max_length} = {self.batch * args.max_length:,} tokens")
        if self.states:
            held = sum(part.nbytes for layer in self.states.ended for part in layer)
            print(f"starts from  {args.initial_state} states, {held / 1e9:.2g} GB a device")
        print(f"steps        {self.steps:,}, {tokens:.3g} tokens, {flops:.3g} FLOP")
        print(
            f"schedule     {args.schedule}, peak {args.learning_rate:g}, {self.schedule.warmup_steps} steps of warm-up"
        )
        if self.config.mup_base_width is not None:
            print(f"muP          rates of in_proj, out_proj and lm_head divided by {self.config.width_multiple:g}")
        print(f"memory       about {memory / 1e9:.1f} GB a device")
        processes = f"{self.world.size} processes ({args.parallel}), " if self.world.size > 1 else ""
        print(f"runs on      {processes}{self.device}, {self.dtype}, {torch.get_num_threads()} threads")
        print(f"with         {versions()}")
        print(f"dt           {self.config.initialization or 'of unrecorded origin'}")
        print(dt_table(dt_bias, A), flush=True)

    def try_one_step(self, output: Path) -> None:
        """A dry run: print the plan and make the first update. Writes nothing."""
        self.build(None)
        self.describe(output)
        progress = Progress(1, self.flops, self.peak(), 0.0)
        row = self.step(0)
        progress.measure(row["tokens"])
        if self.world.is_main:
            progress.line(1, row["loss"], row["gradient_norm"], memory_used(self.device))
            print("dry run: nothing was written")

    def peak(self) -> float | None:
        """Peak FLOP/s of all devices together, None if unknown."""
        peak = peak_flops(self.device, self.dtype)
        return peak and peak * self.world.size


def _counted(tokens: Tokens) -> str:
    empty = f" ({tokens.empty:,} empty ones left out)" if tokens.empty else ""
    return f"{len(tokens.ids):,} tokens, {len(tokens.starts):,} documents{empty}"
