"""Train one model, or every model of a study in turn.

    python train.py                                             the tiny study, into runs/tiny/trained
    python train.py --model-path MODEL --dataset-path DATA --output-dir OUT
    python train.py --model-path models/seed-*-* --output-dir OUT              each into OUT/<name of its folder>
    python train.py --study configs/study-text.toml                            every run of a grid (mamba2/study)

Writes {output-dir}/checkpoint-N while training, {output-dir}/metrics.jsonl, and {output-dir}-final at the end. The same
command again resumes from the last checkpoint, bit for bit; a model whose -final folder exists is not trained again.
SIGTERM, SIGINT or SIGUSR1: a checkpoint after the step under way, and exit code 128 + the signal's number.
Without --dataset-path the corpus is the Python standard library.
"""

import argparse
import dataclasses
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

from mamba2.cli import json_ready, parse_arguments, run, write_preset
from mamba2.data import INITIAL_STATES, STDLIB
from mamba2.distributed import PARALLEL, World
from mamba2.host_memory import keep_freed_memory
from mamba2.initializers import dt_table
from mamba2.study import add_study
from mamba2.training import (
    DECAYS,
    OPTIMIZERS,
    SCHEDULES,
    Counters,
    Job,
    MetricsLog,
    Progress,
    RunFolder,
    Stop,
    Tracker,
    dt_summary,
    memory_used,
    versions,
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-path", nargs="+", help="folder of a model from init.py, or several")
    add(
        "--dataset-path",
        default=STDLIB,
        help="see mamba2/data for what it takes [the Python standard library]",
    )
    add("--output-dir", help="where the results go")
    add("--max-length", type=int, default=1024, help="tokens per window [1024]")
    add("--no-reset", action="store_true", help="carry the state across documents inside a window")
    what = "what a window starts from, in training; mamba2/training/initial_state.py says [zero]"
    add("--initial-state", choices=INITIAL_STATES, default="zero", help=what)
    add("--seed", type=int, default=2163, help="of the order of the data [2163]")

    add = parser.add_argument_group("the step").add_argument
    add("--batch-size", type=int, default=58, help="windows at a time on a device [58]")
    add("--gradient-accumulation-steps", type=int, default=17, help="batches per step, of all devices together [17]")
    add("--num-epochs", "--epochs", type=float, default=1, help="passes over the data [1]")
    add("--max-steps", type=int, help="optimizer steps instead of --num-epochs")
    add("--learning-rate", type=float, default=5e-4, help="peak [5e-4]")
    add("--schedule", choices=SCHEDULES, default="cosine", help="of the rate after the warm-up [cosine]")
    add("--warmup-ratio", type=float, default=0.01, help="share of the steps [0.01]")
    add("--warmup-steps", type=int, help="instead of --warmup-ratio")
    add("--warmup-from-zero", action="store_true", help="the first step has rate 0, as in transformers")
    add("--decay-ratio", type=float, default=0.2, help="share of the steps in which wsd decays [0.2]")
    add("--final-rate-ratio", type=float, default=0.0, help="rate at the end, as a share of the peak [0]")
    what = "; ".join(f"{name}: {function.__doc__}" for name, function in OPTIMIZERS.items()) + " [adamw]"
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help=what)
    add("--dt-lr", type=float, default=1.0, help="of dt_bias, as a multiple; 0 leaves it as initialised [1]")
    add("--A-lr", type=float, default=1.0, help="the same for A_log [1]")
    add("--weight-decay", type=float, default=0.01, help="[0.01]")
    add("--decay", choices=DECAYS, default="matrices", help="what weight decay reaches [matrices]")
    add("--betas", type=float, nargs=2, default=[0.9, 0.99], help="of AdamW [0.9 0.99]")
    add("--eps", type=float, default=1e-8, help="of AdamW [1e-8]")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient; 0: any [1]")
    add("--max-skipped", type=int, default=10, help="steps in a row without a finite gradient that end the run [10]")

    add = parser.add_argument_group("what is watched").add_argument
    add("--eval-steps", type=int, default=1000, help="steps between evaluations [1000]")
    add("--eval-windows", type=int, default=256, help="windows of the validation split that are evaluated [256]")
    add("--patience", type=int, help="stop after so many evaluations in a row that are not the best so far")
    add("--sample-steps", type=int, default=1000, help="steps between samples of text [1000]")
    add("--sample-tokens", type=int, default=64, help="tokens of a sample; 0: none [64]")
    add("--dt-steps", type=int, default=100, help="steps between records of dt, beside 0, 1, 2, 4, 8, … [100]")
    what = "where the numbers go beside metrics.jsonl: {output-dir}/tensorboard, wandb [wandb if there is an API key]"
    add("--log", nargs="*", choices=("tensorboard", "wandb"), default=[], help=what)
    what = "[online with an API key, offline with --log wandb]"
    add("--wandb", choices=("online", "offline", "disabled"), help=what)
    add("--wandb-project", default="mamba2", help="[mamba2]")
    add("--wandb-token", help="API key; the environment variable WANDB_API_KEY keeps it out of the process list")

    add = parser.add_argument_group("what is kept").add_argument
    add("--save-steps", type=int, default=1000, help="steps between checkpoints [1000]")
    add("--keep", type=int, default=5, help="how many of the last checkpoints stay [5]")
    add("--keep-best", action=argparse.BooleanOptionalAction, default=True, help="save and keep the best one [yes]")
    add("--keep-early", action="store_true", help="save and keep those of steps 0, 1, 2, 4, 8, …")
    add("--no-save-final", action="store_true", help="do not write {output-dir}-final")
    add("--resume", default="auto", metavar="auto|PATH|none", help="go on from the last whole checkpoint, or that one")
    add("--overwrite", action="store_true", help="remove what an earlier run left in --output-dir")
    add("--dry-run", action="store_true", help="print the plan, load the data, run one step, write nothing")

    add = parser.add_argument_group("the machine").add_argument
    every = "recompute every k-th block in backward, to need less memory; off, all, or k [all]"
    add("--checkpoint-every", type=checkpoint_interval, default=1, metavar="off|all|K", help=every)
    what = "of the other blocks keep the results of products alone: half of the activations, a few percent slower"
    add("--keep-products-only", action="store_true", help=what)
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="of matrix products [bf16 where it is fast]")
    add("--parallel", choices=PARALLEL, default="ddp", help="under torchrun: copies, or shards of the model [ddp]")
    what = (
        "torch.compile of whole blocks, of the model, or, on a processor, of what is fused between products; graph: "
        "forward and backward as one CUDA graph (one GPU; not run on any yet) [off]"
    )
    add("--compile", choices=("off", "blocks", "model", "fused", "graph"), default="off", help=what)
    add("--device", default="auto", help="auto (the GPU that is there), cpu, cuda, mps or xpu [auto]")
    add("--cuda-visible-devices", help='GPUs to use ["0", unless CUDA_VISIBLE_DEVICES is set]')
    study = add_study(parser, "train")
    args = parse_arguments(parser, "train", required=("model_path", "output_dir"))
    args.study_file = study
    check(args, parser)
    return args


def checkpoint_interval(text: str) -> int:
    value = {"off": 0, "all": 1}.get(text)
    value = int(text) if value is None else value
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be off, all, or at least 0, not {value}")
    return value


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Exit with an error that names a flag whose value is out of its domain."""
    limits = {
        "at least 1": lambda value: value >= 1,
        "at least 0": lambda value: value >= 0,
        "above 0": lambda value: value > 0,
        "from 0 to 1": lambda value: 0 <= value <= 1,
    }
    domains = {
        "at least 1": "batch_size gradient_accumulation_steps max_length max_steps save_steps eval_steps eval_windows "
        "sample_steps dt_steps keep max_skipped patience",
        "at least 0": "warmup_steps sample_tokens weight_decay clip seed dt_lr A_lr",
        "above 0": "num_epochs learning_rate eps",
        "from 0 to 1": "warmup_ratio decay_ratio final_rate_ratio",
    }
    for domain, names in domains.items():
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not (limits[domain](value) and math.isfinite(value)):
                parser.error(f"--{name.replace('_', '-')} must be {domain}, not {value}")
    if not all(0 <= beta < 1 for beta in args.betas):
        parser.error(f"--betas must be from 0 to below 1, not {args.betas[0]} {args.betas[1]}")
    if args.parallel == "fsdp" and "WORLD_SIZE" not in os.environ:
        parser.error(
            "--parallel fsdp needs processes to share the model among: torchrun --nproc-per-node N train.py ..."
        )
    if args.parallel == "fsdp" and args.compile == "model":
        parser.error("--compile model does not go with --parallel fsdp, which gathers block by block; blocks does")
    if args.wandb == "disabled" and "wandb" in args.log:
        parser.error("--wandb disabled does not go with --log wandb; leave out one of them")
    if args.resume not in ("auto", "none") and len(args.model_path) > 1:
        parser.error("--resume PATH goes with one --model-path; auto finds the checkpoint of each")


def main() -> None:
    args = parse()
    keep_freed_memory()
    # Read by CUDA when it is first used, which is later than this.
    if args.cuda_visible_devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = args.cuda_visible_devices
    if "WORLD_SIZE" not in os.environ:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")

    runs = [(Path(path), Path(args.output_dir), args) for path in args.model_path]
    study = args.study_file
    if study and {"model_path": args.model_path, "output_dir": args.output_dir} == study.options("train"):
        runs = [(run.model, run.output, argparse.Namespace(**{**vars(args), **run.options})) for run in study.runs()]
    elif len(runs) > 1 or args.study:
        runs = [(model, output / model.name, args) for model, output, _ in runs]
        if len({output for _, output, _ in runs}) < len(runs):
            raise ValueError("two of the folders in --model-path have the same name, and would share their results")
    for model_path, _, _ in runs:
        if not model_path.is_dir():
            raise FileNotFoundError(f"no model folder at {model_path}")
    world, stopped = World.join(args.device), 0
    for model_path, output, args in runs:
        folder = RunFolder(output, args.keep, args.keep_best, args.keep_early, world)
        if world.first(folder.final.exists) and not args.overwrite and not args.dry_run:
            if world.is_main:
                print(f"{folder.final} is there: {model_path} is not trained again")
        elif args.dry_run:
            Job(model_path, args, world).try_one_step(output)
        elif stopped := train(Job(model_path, args, world), folder):
            break
    world.leave()
    if stopped:
        sys.exit(128 + stopped)


def train(job: Job, folder: RunFolder) -> int:
    """Train one model, from its last checkpoint if there is one. Returns the signal that stopped it, or 0."""
    args, world = job.args, job.world
    identity = world.first(job.identity)
    world.first(folder.lock)
    try:
        checkpoint, state = world.first(lambda: starting_point(job, folder, identity))
        counters = Counters(**state["counters"])
        job.build(checkpoint, counters)
        job.describe(folder.path)
        metrics = tracker = None
        if world.is_main:
            if checkpoint is not None:
                print(f"resumed from {checkpoint}, step {counters.step} of {job.steps}", flush=True)
            options = resolved_options(job, folder)
            write_preset(folder.path / "train.toml", "train", options, f"options of {str(folder.path)!r}\n{versions()}")
            metrics = MetricsLog(folder.path / "metrics.jsonl", counters.step)
            tracker = Tracker(log_to(args), folder.path, options, counters.step, state["wandb_run_id"])
        try:
            stopped = loop(job, folder, counters, metrics, tracker, identity, resumed=checkpoint is not None)
        finally:
            if metrics is not None:
                metrics.close()
                tracker.finish()
        if stopped:
            return stopped
        dt_bias, A = job.dt()
        if not args.no_save_final:
            folder.save_final(job.write_model)
        if world.is_main:
            print(f"dt after training:\n{dt_table(dt_bias, A)}")
            print(f"wrote {folder.path if args.no_save_final else folder.final}", flush=True)
        return 0
    finally:
        if world.is_main:
            folder.unlock()


def starting_point(job: Job, folder: RunFolder, identity: dict[str, Any]) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to go on from and its state, or None and the state of a run that begins. Runs on rank 0."""
    args = job.args
    if args.overwrite and args.resume in ("auto", "none"):
        folder.clear()
    found = folder.find(args.resume)
    if found is None:
        folder.clear()
        return None, {"counters": {}, "wandb_run_id": None}
    checkpoint, state = found
    job.check_same(checkpoint, state, identity)
    step = state["counters"]["step"]
    later = [other for other in folder.checkpoints() if other > step]
    if later and not args.overwrite:
        raise FileExistsError(f"{folder.path} holds later checkpoints ({later}); --overwrite removes them")
    folder.clear(after=step)
    return checkpoint, state


def resolved_options(job: Job, folder: RunFolder) -> dict[str, Any]:
    """The options of this model's run, defaults included, without those that only say how to start."""
    starting = ("preset", "study", "study_file", "resume", "overwrite", "dry_run", "wandb_token")
    options = {name: value for name, value in vars(job.args).items() if name not in starting}
    return {**options, "model_path": [str(job.model_path)], "output_dir": str(folder.path)}


def loop(
    job: Job,
    folder: RunFolder,
    counters: Counters,
    metrics: MetricsLog | None,
    tracker: Tracker | None,
    identity: dict[str, Any],
    resumed: bool,
) -> int:
    """The training loop: before each step, and after the last, evaluate, sample and save where due.

    Every process runs this; rank 0 has `metrics` and `tracker`, and prints. Returns the signal that stopped it, or 0.
    """
    args, steps, world = job.args, job.steps, job.world
    progress = Progress(steps, job.flops, job.peak(), metrics.seconds if metrics else 0.0)

    def say(text: str) -> None:
        if world.is_main:
            print(text, flush=True)

    def log(**values: Any) -> None:
        if world.is_main:
            row = json_ready({"step": counters.step, **values})
            metrics.log(row)
            tracker.log(row)

    def due(every: int, early: bool = False) -> bool:
        step = counters.step
        return step % every == 0 or step == steps or (early and step & (step - 1) == 0)

    def save() -> None:
        state = {
            "counters": dataclasses.asdict(counters),
            "schedule": dataclasses.asdict(job.schedule),
            "samples": job.samples,
            "identity": identity,
            "wandb_run_id": tracker and tracker.run_id,
        }
        if world.is_main:
            metrics.flush()
        say(f"wrote {folder.save(counters.step, state, counters.best_step, job.write_checkpoint)}")

    loss = 0.0  # of the last step, or of the validation split after it
    with Stop() as stop:
        while True:
            # 1. Evaluate, sample and save. A resumed run did that at this step before it was stopped.
            step, is_best = counters.step, False
            if job.validation and due(args.eval_steps) and not resumed:
                loss = job.evaluate()
                log(validation_loss=loss)
                say(f"step {step:{len(str(steps))}} of {steps}   validation {loss:.4f} nats/token")
                is_best = counters.evaluated(loss)
            ends = step == steps or (args.patience is not None and counters.evaluations_since_best >= args.patience)
            if ends and not math.isfinite(loss):
                raise ValueError(f"the loss is {loss} at the end, step {step} of {steps}; lower --learning-rate")
            stops = world.max(stop.signal)
            if not resumed:
                if due(args.dt_steps, early=True) or ends:
                    log(**dt_summary(*job.dt()))
                if job.tokenizer and args.sample_tokens and (due(args.sample_steps) or ends):
                    text = job.sample()
                    log(sample=text)
                    none = "no text: the model's logits are not finite"
                    say(f"--- text at step {step}, temperature 0.8\n{none if text is None else text}\n---")
                if due(args.save_steps, args.keep_early) or ends or stops or (is_best and args.keep_best):
                    save()
            resumed = False
            if ends:
                if step < steps:
                    say(f"stopped at step {step} of {steps}: {args.patience} evaluations without a better one")
                return 0
            if stops:
                say(f"stopped by {signal.Signals(stops).name} at step {step} of {steps}; the same command goes on")
                return stops

            # 2. Take one step.
            progress.pause()
            row = job.step(step)
            loss = row["loss"]
            counters.trained(row["tokens"], skipped=row["gradient_norm"] is None)
            measured = progress.measure(row["tokens"])
            log(**{**row, "tokens": counters.tokens, "skipped": counters.skipped}, **measured)
            if world.is_main:
                progress.line(counters.step, row["loss"], row["gradient_norm"], memory_used(job.device))
            if row["gradient_norm"] is None:
                say(f"step {counters.step}: no finite gradient, so nothing was changed ({counters.skipped} so far)")
            if counters.skipped_in_a_row == args.max_skipped:
                raise ValueError(
                    f"{args.max_skipped} steps in a row had no finite gradient; lower --learning-rate "
                    "and go on from an earlier checkpoint"
                )


def log_to(args: argparse.Namespace) -> set[str]:
    """What --log names, and wandb where --wandb or an API key asks for it."""
    if args.wandb_token:
        print("warning: --wandb-token shows in the process list and the shell's history; prefer WANDB_API_KEY")
        os.environ["WANDB_API_KEY"] = args.wandb_token
    wandb = args.wandb != "disabled" and (args.wandb or os.environ.get("WANDB_API_KEY"))
    return {*args.log, "wandb"} if wandb else set(args.log)


if __name__ == "__main__":
    run(main)
