"""Train one model, or every model of a study in turn.

    python train.py                                             the tiny study, into runs/tiny/trained
    python train.py --model-path MODEL --dataset-path DATA --output-dir OUT
    python train.py --model-path models/seed-*-* --output-dir OUT              each into OUT/<name of its folder>

Writes {output-dir}/checkpoint-N while training, {output-dir}/metrics.jsonl, and {output-dir}-final at the end. A model
whose -final folder is there is not trained again. Without --dataset-path the corpus is the Python standard library.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import torch

from mamba2.checkpoint import atomic_folder
from mamba2.cli import parse_arguments, run
from mamba2.data import STDLIB, Tokens, Windows, load_tokens, load_validation
from mamba2.initializers import dt_table
from mamba2.model import Mamba2LM
from mamba2.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from mamba2.training import (
    accumulate_gradients,
    choose_device,
    choose_dtype,
    learning_rate_factor,
    make_optimizer,
    mean_loss,
)

BETAS = (0.9, 0.99)
CLIP = 1.0
KEPT_CHECKPOINTS = 5
SKIPPED_IN_A_ROW = 10


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
    add("--batch-size", type=int, default=58, help="windows at a time [58]")
    add("--gradient-accumulation-steps", type=int, default=17, help="batches per step [17]")
    add("--learning-rate", type=float, default=5e-4, help="peak [5e-4]")
    add("--weight-decay", type=float, default=0.01, help="of matrices [0.01]")
    add("--warmup-ratio", type=float, default=0.01, help="share of the steps [0.01]")
    add("--max-length", type=int, default=1024, help="tokens per window [1024]")
    add("--num-epochs", type=float, default=1, help="passes over the data [1]")
    add("--max-steps", type=int, help="optimizer steps instead of --num-epochs")
    add("--seed", type=int, default=2163, help="of the order of the data [2163]")
    add("--save-steps", type=int, default=1000, help="steps between checkpoints; the last 5 are kept [1000]")
    add("--eval-steps", type=int, default=1000, help="steps between evaluations [1000]")
    add("--eval-windows", type=int, default=256, help="windows of the validation split that are evaluated [256]")
    add("--no-save-final", action="store_true", help="do not write {output-dir}-final")
    add("--no-reset", action="store_true", help="carry the state across documents inside a window")
    add("--checkpoint-every", type=int, default=1, help="recompute every k-th block in backward; 0: none [1]")
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="of matrix products [bf16 where it is fast]")
    add("--cuda-visible-devices", help='GPUs to use ["0", unless CUDA_VISIBLE_DEVICES is set]')
    add("--wandb", choices=("online", "offline", "disabled"), help="[online if there is an API key, else disabled]")
    add("--wandb-token", help="API key; the environment variable WANDB_API_KEY keeps it out of the process list")
    args = parse_arguments(parser, "train", required=("model_path", "output_dir"))
    for name in ("batch_size", "gradient_accumulation_steps", "max_length", "max_steps", "save_steps", "eval_steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if args.num_epochs <= 0 or args.learning_rate <= 0:
        parser.error("--num-epochs and --learning-rate must be above 0")
    if not 0 <= args.warmup_ratio <= 1:
        parser.error(f"--warmup-ratio must be from 0 to 1, not {args.warmup_ratio}")
    return args


def main() -> None:
    args = parse()
    # Read by CUDA when it is first used, which is later than this.
    if args.cuda_visible_devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = args.cuda_visible_devices
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")

    runs = {Path(path): Path(args.output_dir) for path in args.model_path}
    if len(runs) > 1:
        runs = {model: output / model.name for model, output in runs.items()}
        if len(set(runs.values())) < len(runs):
            raise ValueError("two of the folders in --model-path have the same name, and would share their results")
    for model_path, output in runs.items():
        if not model_path.is_dir():
            raise FileNotFoundError(f"no model folder at {model_path}")
        if any(output.glob("checkpoint-*")) and not final_folder(output).exists():
            raise FileExistsError(f"{output} holds checkpoints of a run that did not end; remove it or choose another")
    for model_path, output in runs.items():
        if final_folder(output).exists():
            print(f"{final_folder(output)} is there: {model_path} is not trained again")
        else:
            train(model_path, output, args)


def train(model_path: Path, output: Path, args: argparse.Namespace) -> None:
    """One model, from its folder to its results."""
    # 1. Load.
    device = choose_device()
    dtype = choose_dtype(args.dtype, device)
    model = Mamba2LM.from_pretrained(model_path, device)
    model.backbone.checkpoint_every = args.checkpoint_every
    tokenizer = tokenizer_of(model_path)
    train_tokens = load_tokens(args.dataset_path, "train", tokenizer)
    validation_tokens = load_validation(args.dataset_path, tokenizer)
    for tokens in (train_tokens, validation_tokens):
        if tokens is not None:
            tokens.check_vocabulary(model.config.vocab_size)
    windows = Windows(train_tokens, args.max_length, reset=not args.no_reset)
    validation = validation_tokens and Windows(validation_tokens, args.max_length, reset=not args.no_reset)

    # 2. Derive, and say.
    batch = args.batch_size * args.gradient_accumulation_steps
    samples = round(args.num_epochs * len(windows)) if args.max_steps is None else args.max_steps * batch
    steps = max(1, -(-samples // batch))
    warmup_steps = round(args.warmup_ratio * steps)
    print(f"\n{model_path} -> {output}")
    describe(model, train_tokens, validation_tokens, args, device, dtype, steps, batch)
    tracker = start_wandb(args, output)

    # 3. Train.
    optimizer = make_optimizer(model, args.learning_rate, BETAS, args.weight_decay)
    output.mkdir(parents=True, exist_ok=True)
    model.train()
    skipped = 0
    started, seen = time.perf_counter(), 0
    with open(output / "metrics.jsonl", "w", encoding="utf-8", buffering=1) as metrics:

        def log(**values: float) -> None:
            metrics.write(json.dumps(values) + "\n")
            if tracker is not None:
                tracker.log(values, step=values["step"])

        for step in range(steps + 1):
            if validation and (step % args.eval_steps == 0 or step == steps):
                loss = mean_loss(model, validation, args.eval_windows, args.batch_size, dtype)
                log(step=step, validation_loss=loss)
                print(f"step {step:6} of {steps}   validation {loss:.4f} nats/token", flush=True)
            if step and step % args.save_steps == 0:
                save(model, tokenizer, output / f"checkpoint-{step}")
                remove_old_checkpoints(output)
            if step == steps:
                break
            rate = args.learning_rate * learning_rate_factor(step, steps, warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            indices = windows.indices(args.seed, step, batch)[: samples - step * batch]
            loss, tokens = accumulate_gradients(model, windows, indices, args.batch_size, dtype)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
            if torch.isfinite(torch.tensor(norm)):
                optimizer.step()
                skipped = 0
            else:
                skipped += 1
                print(f"step {step}: gradient norm {norm}, step skipped")
                if skipped == SKIPPED_IN_A_ROW:
                    raise ValueError(f"{skipped} steps in a row had no finite gradient; lower --learning-rate")
            optimizer.zero_grad(set_to_none=True)
            seen += tokens
            elapsed = time.perf_counter() - started
            log(step=step + 1, loss=loss, learning_rate=rate, gradient_norm=norm, tokens=seen, seconds=elapsed)
            if (step + 1) % max(1, steps // 20) == 0 or step == 0:
                left = elapsed / (step + 1) * (steps - step - 1)
                print(
                    f"step {step + 1:6} of {steps}   loss {loss:.4f}   gradient {norm:.2f}   "
                    f"{seen / elapsed:,.0f} tokens/s   {left:.0f} s left",
                    flush=True,
                )

    # 4. Save.
    print("dt after training:")
    print(dt_table(model.dt_bias(), model.A()))
    if not args.no_save_final:
        save(model, tokenizer, final_folder(output))
    if tracker is not None:
        tracker.finish()


def final_folder(output: Path) -> Path:
    return output.with_name(output.name + "-final")


def tokenizer_of(model_path: Path) -> Tokenizer | None:
    """The tokenizer that a model carries, or None: such a model is trained on ready ids."""
    try:
        return load_tokenizer(model_path)
    except ValueError:
        return None


def save(model: Mamba2LM, tokenizer: Tokenizer | None, folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            save_tokenizer(tokenizer, temporary)
    print(f"wrote {folder}", flush=True)


def remove_old_checkpoints(output: Path) -> None:
    checkpoints = sorted(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    for folder in checkpoints[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(folder)


def describe(
    model: Mamba2LM,
    train_tokens: Tokens,
    validation_tokens: Tokens | None,
    args: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    steps: int,
    batch: int,
) -> None:
    """Print the derived quantities and the dt of every layer."""
    held_out = f"{len(validation_tokens.ids):,} held out" if validation_tokens else "no validation split"
    tokens = steps * batch * args.max_length
    print(f"parameters   {model.config.num_parameters():,}")
    print(f"data         {args.dataset_path}: {len(train_tokens.ids):,} tokens, {len(train_tokens.starts):,} documents")
    print(f"             {held_out}")
    print(f"step         {batch} windows of {args.max_length} = {batch * args.max_length:,} tokens at most")
    print(f"steps        {steps:,}, {tokens:.3g} tokens, {tokens * model.config.flops_per_token():.3g} FLOP")
    print(f"runs on      {device}, {dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    applied = model.config.dt_bias_init
    print(f"dt           {applied['name'] if applied else 'of unrecorded origin'}")
    print(dt_table(model.dt_bias(), model.A()), flush=True)


def start_wandb(args: argparse.Namespace, output: Path):
    """A wandb run, or None. Tracking that cannot start is said and then left out: it must not cost a training run."""
    if args.wandb_token:
        print("warning: --wandb-token shows in the process list and the shell's history; prefer WANDB_API_KEY")
        os.environ["WANDB_API_KEY"] = args.wandb_token
    mode = args.wandb or ("online" if os.environ.get("WANDB_API_KEY") else "disabled")
    if mode == "disabled":
        return None
    import wandb

    values = {key: value for key, value in vars(args).items() if key != "wandb_token"}
    try:
        return wandb.init(project="mamba2", name=output.name, mode=mode, config=values, dir=str(output.parent))
    except (wandb.errors.Error, OSError) as error:
        print(f"warning: wandb does not start ({error}); metrics.jsonl holds everything all the same")
        return None


if __name__ == "__main__":
    run(main)
