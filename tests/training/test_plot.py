"""The picture of a run."""

import json

import pytest

from mamba2.training.plot import column, draw, read_rows

ROWS = [
    {"step": 0, "validation_loss": 3.0},
    {"step": 0} | {f"{name}_{s}": [0.1, 0.2] for name in ("dt", "half_life") for s in ("min", "median", "max")},
    {"step": 1, "loss": 3.0, "gradient_norm": 1.0, "learning_rate": 1e-3},
    {"step": 2, "loss": None, "gradient_norm": None, "learning_rate": 1e-3},
    {"step": 3, "loss": 2.5, "gradient_norm": 0.5, "learning_rate": 1e-3},
]


def test_a_run_is_drawn_and_steps_without_a_loss_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    rows = read_rows(tmp_path)
    steps, losses = column(rows, "loss")
    assert steps.tolist() == [1, 3] and losses.tolist() == [3.0, 2.5]
    draw(rows, "run", tmp_path / "metrics.png")
    assert (tmp_path / "metrics.png").read_bytes()[:4] == b"\x89PNG"


def test_a_folder_without_metrics_and_a_run_without_steps_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl in"):
        read_rows(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(ValueError, match="no training step yet"):
        read_rows(tmp_path)
