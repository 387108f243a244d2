"""What docs/kernels.md shows: one more term of the decay, forward and backward, changes few lines in few files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATCH = Path(__file__).with_name("extra_decay.patch")

SCRIPT = """
import os
import torch
from mamba2.ops import ssd

generator = torch.Generator().manual_seed(0)
shapes = {"x": (1, 37, 2, 16), "dt": (1, 37, 2), "A": (2,), "B": (1, 37, 1, 16), "C": (1, 37, 1, 16)}
shapes["extra"] = shapes["dt"]
tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
for name in ("A", "extra"):
    tensors[name] = -tensors[name].abs()
results = []
for backend in ("reference", "triton"):
    os.environ["MAMBA2_BACKEND"] = backend
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    y = ssd(**leaves, chunk_size=8, dt_softplus=True)
    results.append([y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))])
for name, expected, actual in zip(("y", *tensors), *results):
    assert expected.norm() > 0 and (actual - expected).norm() < 1e-5 * expected.norm(), name
"""


@pytest.mark.slow
def test_an_extra_decay_of_each_token_and_head_takes_sixty_lines(tmp_path):
    shutil.copytree(ROOT / "mamba2", tmp_path / "mamba2", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "apply", str(PATCH)], cwd=tmp_path, check=True)
    lines = PATCH.read_text(encoding="utf-8").splitlines()
    changed = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert len(changed) <= 60 and sum(line.startswith("+++") for line in lines) <= 5
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
