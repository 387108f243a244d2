"""Reads the training history of a run, and checks whether runs can be compared."""

import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mamba2.initializers import inverse_softplus
from mamba2.study.grid import TRAINED, factors

# Options in train.toml that two runs may differ in.
FREE = (
    *(
        "model_path",
        "output_dir",
        "wandb",
        "wandb_project",
        "log",
        "save_steps",
        "keep",
        "keep_best",
        "keep_early",
        "parallel",
    ),
    *("sample_steps", "sample_tokens", "dt_steps", "batch_size", "gradient_accumulation_steps", "checkpoint_every"),
    *("cuda_visible_devices", "compile", "no_save_final", "study"),
)
# What trainer_state.json says of the data.
RECORDED = ("training data (sha256)", "validation data (sha256)", "tokenizer", "windows per step")
LAST = 5  # evaluations that make up the primary endpoint


Key = tuple[str, int]  # initialisation, seed
Values = dict[str, dict[int, float]]  # by initialisation and seed


@dataclass(frozen=True)
class History:
    """The training of one run."""

    folder: Path
    steps: np.ndarray  # of the evaluations, that of step 0 included
    tokens: np.ndarray  # seen before each
    losses: np.ndarray  # nats per token, held out
    sum_of_rates: float  # of all steps
    dt_drift: tuple[np.ndarray, np.ndarray]  # Σ lr, and how far the layers' median dt_bias has moved (mean over layers)
    settings: dict[str, Any]  # what runs that are compared must share, without what their names state
    diverged: str | None  # how; None: it did not

    @property
    def endpoint(self) -> float:
        """Mean of the last evaluations, at most LAST, never that of step 0: nan if there is none."""
        losses = self.losses[self.steps > 0][-LAST:]
        return float(losses.mean()) if len(losses) else math.nan

    @property
    def area(self) -> float:
        """Mean held-out loss over the tokens seen, nats: the area under the learning curve by its width."""
        return float(np.trapezoid(self.losses, self.tokens) / (self.tokens[-1] - self.tokens[0]))

    def tokens_to(self, target: float) -> float:
        """Tokens until the held-out loss first reaches `target`, interpolated linearly; nan: never."""
        reached = np.flatnonzero(self.losses <= target)
        if not len(reached):
            return math.nan
        i = int(reached[0])
        if i == 0:
            return float(self.tokens[0])
        share = (self.losses[i - 1] - target) / (self.losses[i - 1] - self.losses[i])
        return float(self.tokens[i - 1] + share * (self.tokens[i] - self.tokens[i - 1]))


@dataclass(frozen=True)
class Evaluated:
    """One run: its training, and what eval.py measured (see eval.py for the keys of `record`)."""

    history: History
    record: dict


def unit(runs: dict[Key, Evaluated]) -> str:
    """The unit that losses are averaged over: in synthetic tasks only answers count."""
    return "token" if any(run.record["results"] for run in runs.values()) else "answer"


def names(runs: dict[Key, Evaluated]) -> list[str]:
    return list(dict.fromkeys(name for name, _ in runs))


def read_history(folder: Path) -> History:
    """Read metrics.jsonl, and train.toml and the last checkpoint's trainer_state.json where they are.

    Raises FileNotFoundError or ValueError naming the file that is missing or damaged.
    """
    rows = _rows(folder / "metrics.jsonl")
    trained = [row for row in rows if "loss" in row]
    evaluated = [row for row in rows if "validation_loss" in row]
    if not trained:
        raise ValueError(f"{folder / 'metrics.jsonl'} has no training step")
    seen = {0: 0} | {row["step"]: row["tokens"] for row in trained}
    rates = np.cumsum([row.get("learning_rate", 0.0) for row in trained])
    sum_at = {0: 0.0} | {row["step"]: float(total) for row, total in zip(trained, rates)}
    losses = [_number(row["validation_loss"]) for row in evaluated]
    settings = {"steps": trained[-1]["step"], "tokens": seen[trained[-1]["step"]], **_settings(folder)}
    return History(
        folder,
        np.array([row["step"] for row in evaluated]),
        np.array([seen[row["step"]] for row in evaluated], dtype=np.float64),
        np.array(losses),
        float(rates[-1]),
        _dt_drift(rows, sum_at),
        settings,
        _divergence(trained, losses),
    )


def _rows(file: Path) -> list[dict]:
    if not file.is_file():
        raise FileNotFoundError(f"no {file}: the report needs what train.py wrote there")
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number} is not JSON: {error}") from error
    return rows


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _divergence(trained: list[dict], losses: list[float]) -> str | None:
    last = trained[-1]
    if not math.isfinite(_number(last["loss"])):
        return f"the loss is not finite at step {last['step']}"
    if losses and not math.isfinite(losses[-1]):
        return "the last held-out loss is not finite"
    if len(losses) > 1 and losses[-1] > losses[0]:
        return f"it ends at {losses[-1]:.3f} nats, above the {losses[0]:.3f} it began with"
    return None


def _dt_drift(rows: list[dict], sum_at: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    known = [row for row in rows if "dt_median" in row]
    if not known:
        return np.zeros(0), np.zeros(0)
    medians = np.array([row["dt_median"] for row in known], dtype=np.float64)  # null, what was not finite, becomes NaN
    bias = inverse_softplus(torch.from_numpy(medians)).numpy()  # (records, L)
    return np.array([sum_at[row["step"]] for row in known]), np.abs(bias - bias[0]).mean(1)


def _settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    stated = [key for key in factors(folder.name) if key in TRAINED]
    if (folder / "train.toml").is_file():
        options = tomllib.loads((folder / "train.toml").read_text(encoding="utf-8")).get("train", {})
        settings |= {
            f"--{key.replace('_', '-')}": value for key, value in options.items() if key not in (*FREE, *stated)
        }
    checkpoints = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda f: int(f.parent.name.split("-")[1]))
    if checkpoints:
        identity = json.loads(checkpoints[-1].read_text(encoding="utf-8")).get("identity", {})
        settings |= {key: identity[key] for key in RECORDED if key in identity}
    return settings


def check_comparable(settings: dict[str, dict[str, Any]]) -> None:
    """Raises ValueError naming two runs and what they differ in. `settings` by the name of the run; what runs state in
    their names is left out of theirs, and compared among the others."""
    stated = {f"--{key.replace('_', '-')}" for key in TRAINED}
    for key in dict.fromkeys(key for of_run in settings.values() for key in of_run):
        values = {name: of_run.get(key) for name, of_run in settings.items() if key in of_run or key not in stated}
        first = next(iter(values))
        for other, value in values.items():
            if value != values[first]:
                raise ValueError(
                    f"{first} and {other} cannot be compared: {key} is {values[first]!r} in the one and {value!r} in "
                    "the other"
                )
