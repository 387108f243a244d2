"""Time that the training loop takes beside forward, backward and optimizer.

    python -m benchmarks.loop_overhead               # the study's model, 8 steps of 4 windows of 1024: about a minute
    python -m benchmarks.loop_overhead --preset tiny # any option of train.py

Runs train.py's own loop on the Python standard library and times its parts; evaluation, samples and saves fall before
and after the steps that count. On a GPU each part is synchronised, so parts do not overlap as in a real run.
"""

import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

import train
from mamba2.config import Mamba2Config
from mamba2.model import Mamba2LM
from mamba2.tokenizer import get_tokenizer, save_tokenizer
from mamba2.training import job
from mamba2.training.metrics import MetricsLog

CONFIG = Path(__file__).parent.parent / "configs" / "config.json"
OPTIONS = "--batch-size 2 --gradient-accumulation-steps 2 --max-steps 8 --checkpoint-every off --wandb disabled"
WATCHED = ("forward", "backward", "optimizer", "logging")


class Clock:
    """Adds up the seconds spent in the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def around(self, owner: object, function: str, part: str) -> None:
        original: Callable = getattr(owner, function)

        def timed(*args, **kwargs):
            started = now()
            result = original(*args, **kwargs)
            self.seconds[part] += now() - started
            return result

        setattr(owner, function, timed)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    clock, marks = Clock(), []
    clock.around(Mamba2LM, "forward", "forward")
    clock.around(torch.Tensor, "backward", "backward")
    clock.around(job, "update", "optimizer")
    clock.around(MetricsLog, "log", "logging")
    original = train.Job.step

    def step(self, index):
        marks.append((now(), dict(clock.seconds)))  # the last mark is at the start of the last step
        return original(self, index)

    train.Job.step = step
    folder = Path(tempfile.mkdtemp())
    try:
        Mamba2LM(Mamba2Config.from_json(CONFIG)).save_pretrained(folder / "model")
        save_tokenizer(get_tokenizer("bytes"), folder / "model")
        paths = ["--model-path", str(folder / "model"), "--output-dir", str(folder / "out")]
        quiet = ["--sample-tokens", "0", "--eval-windows", "1", "--no-save-final"]
        sys.argv = ["train.py", *OPTIONS.split(), *sys.argv[1:], *paths, *quiet]
        train.main()
    finally:
        shutil.rmtree(folder)
    # From the start of the second step, after what is done once, to the start of the last.
    (started, before), (ended, after) = marks[1], marks[-1]
    total, steps = ended - started, len(marks) - 2
    print(f"\n{steps} steps, {total / steps * 1000:.1f} ms each")
    parts = {part: after.get(part, 0.0) - before.get(part, 0.0) for part in WATCHED}
    for part, seconds in {**parts, "data and all else": total - sum(parts.values())}.items():
        print(f"{part:20} {seconds / steps * 1000:9.2f} ms {seconds / total:8.2%}")
    overhead = 1 - (parts["forward"] + parts["backward"] + parts["optimizer"]) / total
    print(f"{'overhead':20} {overhead * total / steps * 1000:9.2f} ms {overhead:8.2%}")


if __name__ == "__main__":
    main()
