"""Logging: metrics.jsonl, wandb and TensorBoard when asked, and a line of progress."""

import contextlib
import json
import math
import os
import textwrap
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mamba2.cli import explain_missing
from mamba2.files import write_text
from mamba2.initializers import half_life

SECONDS_BETWEEN_LINES = 10.0
WANDB_SECONDS = 30.0  # how long to wait for its server at the start


class MetricsLog:
    """metrics.jsonl: one JSON object per line, each with its `step`.

    Opening it for a run that resumes from `step` drops the rows of later steps and an incomplete last line, so that no
    step is logged twice. `seconds` is the training time recorded in the last row kept.
    """

    def __init__(self, file: Path, step: int):
        self._path, self.seconds = file, 0.0
        rows = read_metrics(file, step) if file.exists() else []
        self.seconds = next((row["seconds"] for row in reversed(rows) if "seconds" in row), 0.0)
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = open(file, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (open for the whole run)

    def log(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, allow_nan=False) + "\n")

    def flush(self) -> None:
        """Write to disk. Called before a checkpoint, so that no step before it can be missing here."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(file: Path, step: float = math.inf) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl up to `step`, without an incomplete last line. Another that is no JSON: ValueError."""
    rows = []
    for number, line in enumerate(lines := file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # incomplete: the process was killed
                break
            raise ValueError(f"{file}, line {number} is not JSON: {error}; mend or move the file") from error
        if row["step"] <= step:
            rows.append(row)
    return rows


def scalars(row: dict[str, Any]) -> dict[str, float | str]:
    """What a tracker is given of a row of metrics.jsonl: numbers and texts by name, without what was not finite.

    Lists with a value per layer become `name/layer i`.
    """
    flat = {}
    for key, value in row.items():
        flat |= {f"{key}/layer {i}": v for i, v in enumerate(value)} if isinstance(value, list) else {key: value}
    return {key: value for key, value in flat.items() if value is not None and key != "step"}


class TensorBoard:
    """Event files in `folder`/tensorboard, with those methods of a wandb run that are called here.

    TensorBoard then no longer shows what an earlier writer wrote of steps above `step`.
    """

    def __init__(self, folder: Path, options: dict[str, Any], step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        lines = (f"{key} = {json.dumps(value)}" for key, value in options.items() if value is not None)
        self.log({"options": "\n".join(lines)}, step + 1)

    def log(self, values: dict[str, float | str], step: int) -> None:
        for key, value in values.items():
            if isinstance(value, str):
                self._writer.add_text(key, textwrap.indent(value, "    ", lambda line: True), step)  # not as Markdown
            else:
                self._writer.add_scalar(key, value, step)
        self._writer.flush()  # a killed run loses no step that a resumed one will not take again

    def finish(self) -> None:
        self._writer.close()


class Tracker:
    """Runs of wandb and TensorBoard that take the rows of metrics.jsonl; with an empty `to`, none.

    `options` are those of train.py: `wandb` (None: online with an API key, else offline) and `wandb_project` say how; a
    run's name is its folder's. `run_id` identifies the wandb run of a resumed training run; None without one. After an
    error of one it warns and stops logging there, and training continues; with `strict` it raises OSError.
    """

    def __init__(
        self,
        to: Iterable[str],
        folder: Path,
        options: dict[str, Any],
        step: int = 0,
        run_id: str | None = None,
        strict: bool = False,
    ):
        self._runs, self.run_id, self._strict = {}, run_id, strict
        for name in to:
            with self._or_warn(name, "does not start"):
                if name == "tensorboard":
                    self._runs[name] = TensorBoard(folder, options, step)
                else:
                    self._runs[name] = _start_wandb(folder, options, run_id)
                    self.run_id = self._runs[name].id

    def log(self, row: dict[str, Any]) -> None:
        for name, run in list(self._runs.items()):
            with self._or_warn(name, "no longer takes values"):
                run.log(scalars(row), step=row["step"])

    def finish(self) -> None:
        for name, run in list(self._runs.items()):
            with self._or_warn(name, "does not finish"):
                run.finish()

    @contextlib.contextmanager
    def _or_warn(self, name: str, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # wandb raises its own errors and those of the network
            self._runs.pop(name, None)
            sentence = f"{name} {what} ({explain_missing(error)})"
            if self._strict:
                raise OSError(sentence) from error
            print(f"warning: {sentence}; metrics.jsonl holds everything all the same", flush=True)


def _start_wandb(folder: Path, options: dict[str, Any], run_id: str | None) -> Any:
    import wandb

    return wandb.init(
        project=options["wandb_project"],
        name=folder.resolve().name,
        id=run_id,
        resume="allow",
        mode=options["wandb"] or ("online" if os.environ.get("WANDB_API_KEY") else "offline"),
        config=options,
        dir=str(folder),
        settings=wandb.Settings(init_timeout=WANDB_SECONDS),
    )


def dt_summary(dt_bias: torch.Tensor, A: torch.Tensor) -> dict[str, list[float]]:
    """Per layer, the min, median and max over heads of the nominal dt and of the half-life in tokens.

    dt_bias and A are (L, h). Returns lists of length L under dt_min, dt_median, ..., half_life_max.
    """
    dt = F.softplus(dt_bias.detach().cpu().double())
    tau = half_life(dt, A.detach().cpu().double())
    return {
        f"{name}_{statistic}": [float(f"{value:.6g}") for value in function(values)]
        for name, values in (("dt", dt), ("half_life", tau))
        for statistic, function in (
            ("min", lambda x: x.amin(1)),
            ("median", lambda x: x.quantile(0.5, dim=1)),
            ("max", lambda x: x.amax(1)),
        )
    }


class Progress:
    """Measures the speed of a run and prints a line of progress every ten seconds."""

    def __init__(self, steps: int, flops_per_token: int, peak: float | None, seconds_before: float):
        """`peak`: FLOP/s of all devices together, None if unknown. `seconds_before`: training time before a resume."""
        self._steps, self._flops, self._peak = steps, flops_per_token, peak
        self._started = time.perf_counter() - seconds_before
        self._last = self._printed = time.perf_counter()
        self._since_line: list[tuple[int, float]] = []

    def measure(self, tokens: int) -> dict[str, float]:
        """For the step that ends now: tokens/s, MFU if the peak is known, and seconds since the run began."""
        now = time.perf_counter()
        took, self._last = now - self._last, now
        self._since_line.append((tokens, took))
        values = {"tokens_per_second": round(tokens / took, 1)}
        if self._peak:
            values["mfu"] = round(tokens * self._flops / took / self._peak, 4)
        return {**values, "seconds": round(now - self._started, 3)}

    def pause(self) -> None:
        """Start timing the next step now, without the evaluation and saving since the last one."""
        self._last = time.perf_counter()

    def line(self, step: int, loss: float, norm: float | None, memory: int) -> None:
        """Print a line for step `step` if it is the first or last, or ten seconds after the previous line."""
        now = time.perf_counter()
        if step not in (1, self._steps) and now - self._printed < SECONDS_BETWEEN_LINES:
            return
        tokens, seconds = (sum(column) for column in zip(*self._since_line))
        left = seconds / len(self._since_line) * (self._steps - step)
        self._printed, self._since_line = now, []
        parts = [f"step {step:{len(str(self._steps))}} of {self._steps}", f"loss {loss:.4f}"]
        parts += ["no finite gradient" if norm is None else f"gradient {norm:.2f}", f"{tokens / seconds:,.0f} tokens/s"]
        if self._peak:
            parts.append(f"MFU {tokens * self._flops / seconds / self._peak:.0%}")
        parts += [f"{memory / 1e9:.2f} GB"] * (memory > 0) + [f"{_duration(left)} left"]
        print("   ".join(parts), flush=True)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds) or seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
