"""Where a run's numbers go: metrics.jsonl always, wandb when asked, one line of progress."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mamba2.files import write_text
from mamba2.initializers import half_life

SECONDS_BETWEEN_LINES = 10.0
WANDB_SECONDS = 30.0  # to reach its server at the start; a run waits no longer


class MetricsLog:
    """metrics.jsonl: one JSON object a line, each with its `step`.

    Opened for a run that goes on from `step`, rows of later steps and a torn last line go: no step counts twice.
    `seconds` is the training time that the rows kept speak of.
    """

    def __init__(self, file: Path, step: int):
        self._path, self.seconds = file, 0.0
        rows = _rows(file, step) if file.exists() else []
        self.seconds = next((row["seconds"] for row in reversed(rows) if "seconds" in row), 0.0)
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = open(file, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (open for the whole run)

    def log(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, allow_nan=False) + "\n")

    def flush(self) -> None:
        """To the disk: called before a checkpoint, whose steps must not be missing here."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _rows(file: Path, step: int) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(lines := file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # cut short by a kill
                break
            raise ValueError(f"{file}, line {number} is not JSON: {error}; mend or move the file") from error
        if row["step"] <= step:
            rows.append(row)
    return rows


class Tracker:
    """A wandb run, or nothing. What goes wrong in it is said once and then left out: it must not cost a training run.

    `run_id` names the wandb run, for a resumed one to go on in it; None when there is none.
    """

    def __init__(self, mode: str, project: str, name: str, folder: Path, options: dict[str, Any], run_id: str | None):
        self._run, self.run_id = None, run_id
        if mode == "disabled":
            return
        try:
            import wandb

            self._run = wandb.init(
                project=project,
                name=name,
                id=run_id,
                resume="allow",
                mode=mode,
                config=options,
                dir=str(folder),
                settings=wandb.Settings(init_timeout=WANDB_SECONDS),
            )
            self.run_id = self._run.id
        except Exception as error:  # wandb raises errors of its own and of the network; see above
            self._give_up("does not start", error)

    def log(self, row: dict[str, Any]) -> None:
        if self._run is None:
            return
        flat = {}
        for key, value in row.items():
            values = {f"{key}/layer {i}": v for i, v in enumerate(value)} if isinstance(value, list) else {key: value}
            flat |= values
        try:
            self._run.log(flat, step=row["step"])
        except Exception as error:  # as above
            self._give_up("no longer takes values", error)

    def finish(self) -> None:
        try:
            if self._run is not None:
                self._run.finish()
        except Exception as error:  # as above
            self._give_up("does not finish", error)

    def _give_up(self, what: str, error: Exception) -> None:
        print(f"warning: wandb {what} ({error}); metrics.jsonl holds everything all the same", flush=True)
        self._run = None


def dt_summary(dt_bias: torch.Tensor, A: torch.Tensor) -> dict[str, list[float]]:
    """Per layer: smallest, median and largest nominal dt, and half-life in tokens, over the heads; (L, h) each."""
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
    """Speed of a run, and a line of it every ten seconds."""

    def __init__(self, steps: int, flops_per_token: int, peak: float | None, seconds_before: float):
        """`peak`: FLOP/s of all devices together, None if unknown. `seconds_before`: trained before a resumption."""
        self._steps, self._flops, self._peak = steps, flops_per_token, peak
        self._started = time.perf_counter() - seconds_before
        self._last = self._printed = time.perf_counter()
        self._since_line: list[tuple[int, float]] = []

    def measure(self, tokens: int) -> dict[str, float]:
        """Of the step that ends now: tokens/s, MFU where a peak is known, and seconds since the run began."""
        now = time.perf_counter()
        took, self._last = now - self._last, now
        self._since_line.append((tokens, took))
        values = {"tokens_per_second": round(tokens / took, 1)}
        if self._peak:
            values["mfu"] = round(tokens * self._flops / took / self._peak, 4)
        return {**values, "seconds": round(now - self._started, 3)}

    def pause(self) -> None:
        """Leave what happened since the last step (evaluation, saving) out of the next one's time."""
        self._last = time.perf_counter()

    def line(self, step: int, loss: float, norm: float | None, memory: int) -> None:
        """Print the state after `step` steps, if ten seconds have passed or the run begins or ends."""
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
        parts += [f"{memory / 1e9:.2f} GB", f"{_duration(left)} left"]
        print("   ".join(parts), flush=True)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds) or seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
