"""A study small enough to train in a second, run by train.main in the test's own process."""

import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import pytest

import train
from mamba2.model import Mamba2LM
from mamba2.tokenizer import get_tokenizer, save_tokenizer
from tests.test_model import small_config

# 4 windows a step, of 32 tokens, in two batches.
SMALL = "--batch-size 2 --gradient-accumulation-steps 2 --max-length 32 --max-steps 8 --save-steps 2 --eval-steps 4"
SMALL += " --sample-tokens 4 --sample-steps 4 --dtype fp32 --eval-windows 8 --checkpoint-every off --warmup-steps 2"
TIMES = ("seconds", "tokens_per_second", "mfu")


def make_study(folder: Path) -> Path:
    """folder/model and folder/data, with the data set's cache inside as well."""
    os.environ["MAMBA2_CACHE"] = str(folder / "cache")
    model = Mamba2LM(small_config(vocab_size=257, num_hidden_layers=2), seed=3, initialization="uniform")
    model.save_pretrained(folder / "model")
    save_tokenizer(get_tokenizer("bytes"), folder / "model")
    for split, lines in (("train", range(60)), ("validation", range(60, 70))):
        (folder / "data" / split).mkdir(parents=True)
        for i in lines:
            text = f"This is line {i} of a small corpus, and {i * i} is its square.\n"
            (folder / "data" / split / f"{i}.txt").write_text(text)
    return folder


def arguments(study: Path, output: Path, *options: object) -> list[str]:
    paths = ["--model-path", study / "model", "--dataset-path", study / "data", "--output-dir", output]
    return [*map(str, paths), *SMALL.split(), *map(str, options)]


def run_train(*command: str) -> None:
    """train.py with these arguments; raises what it raises, SystemExit included.

    The processor's speed is not measured: that takes longer than to train.
    """
    speed = mock.patch("mamba2.training.job.peak_flops", lambda device, dtype: 1e12)
    with mock.patch.object(sys, "argv", ["train.py", *command]), speed:
        train.main()


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal in the middle of the step that is the `steps`-th from now."""
    original, calls = train.Job.step, []

    def step(job, index):
        calls.append(index)
        if len(calls) == steps:
            os.kill(os.getpid(), number)
        return original(job, index)

    monkeypatch.setattr(train.Job, "step", step)


def metrics(output: Path, key: str | None = None) -> list[dict]:
    """Rows of metrics.jsonl without what a clock decides; with `key` those that have it."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    return [row for row in rows if key is None or key in row]


def contents(output: Path) -> dict[str, object]:
    """Every file of a run to the bit, its final model included, but for clocks and for its own path."""
    files = {}
    for root in (output, output.with_name(output.name + "-final")):
        for file in sorted(path for path in root.rglob("*") if path.is_file() and path.name != ".lock"):
            name = f"{root.name.removeprefix(output.name)}/{file.relative_to(root)}"
            files[name] = metrics(output) if file.name == "metrics.jsonl" else file.read_bytes()
    text = files["/train.toml"].decode()
    files["/train.toml"] = [line for line in text.splitlines() if not line.startswith(("#", "output_dir"))]
    files["links"] = {link.name: os.readlink(link) for link in output.iterdir() if link.is_symlink()}
    return files
