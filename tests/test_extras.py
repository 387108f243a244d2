"""What works without the packages that only some commands need, and what is said where one is missing."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mamba2.cli import EXTRAS
from tests.test_model import small_config

ROOT = Path(__file__).parent.parent
WITHOUT = f"""
import os, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules.update(dict.fromkeys({list(EXTRAS)}))  # importing one raises ModuleNotFoundError
sys.modules["fcntl"] = None  # what Windows lacks
del signal.SIGUSR1, os.sysconf
sys.argv = sys.argv[1:]
if sys.argv[0].endswith(".py"):
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(sys.argv[0], run_name="__main__")
"""


def run_without(folder: Path, command: str, code: int = 0) -> subprocess.CompletedProcess:
    script, *options = command.split(" ")
    script = str(ROOT / script) if script.endswith(".py") else script
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT, script, *options], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of text, created and trained without any extra, fcntl, SIGUSR1 and sysconf."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "text/train").mkdir(parents=True)
    (folder / "text/train/a.txt").write_text("To be, or not to be, that is the question. " * 40)
    (folder / "pair.jsonl").write_text('{"text": "One text."}\n{"text": "Another one."}\n')
    small_config(num_hidden_layers=2, vocab_size=257).save(folder / "config.json")
    run_without(folder, "init.py --config-path config.json --output-path models --initializations log_uniform")
    options = (
        "--batch-size 2 --gradient-accumulation-steps 1 --max-length 32 --max-steps 3 --dtype fp32 --wandb offline"
    )
    model = "models/seed-42-log_uniform"
    result = run_without(folder, f"train.py --model-path {model} --dataset-path text --output-dir out {options}")
    assert "no triton" in result.stdout
    assert f"warning: wandb does not start (this needs the package wandb: pip install '{ROOT}[wandb]')" in result.stdout
    return folder


def test_models_are_made_trained_and_sampled_without_any_extra(trained):
    assert (trained / "out-final/model.safetensors").is_file()
    result = run_without(trained, "mamba2.generate out-final To --max-new-tokens 5 --greedy")
    assert result.stdout.startswith("To")


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("eval.py --model-base-path . --dataset-name pair.jsonl --seeds 42 --initializations x", "report"),
        ("train.py --model-path models/seed-42-log_uniform --dataset-path no/such --output-dir o", "data"),
        ("mamba2.evaluation --model mamba2 --model_args pretrained=out-final --tasks wikitext", "harness"),
        ("mamba2.checkpoint convert out-final out.gguf --to gguf", "gguf"),
        ("mamba2.training.log out --to tensorboard", "tensorboard"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(trained, command, extra):
    (trained / "seed-42-x").exists() or (trained / "seed-42-x").symlink_to(trained / "out-final")
    error = run_without(trained, command, code=1).stderr
    assert "error: " in error and "this needs the package" in error and f"pip install '{ROOT}[{extra}]'" in error
    assert "Traceback" not in error


def test_kernels_without_triton_say_so():
    code = WITHOUT.split("sys.argv =")[0]
    code += "import torch; from mamba2.ops.norm import _add_forward_kernel as kernel; kernel[(1,)](torch.ones(1))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode and "the Triton kernels need the package triton" in result.stderr


def test_requirements_hold_what_the_extras_ask_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    others = ("all", "harness")  # the harness brings what its tasks need, and only it needs that
    asked = {
        *project["dependencies"],
        *(package for name, of in extras.items() if name not in others for package in of),
    }
    listed = {line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()}
    names = {package.split(">")[0].split("=")[0] for package in listed}
    assert {package.split(">")[0] for package in asked} == names
    assert {package for package in asked if not package.startswith("torch")} <= listed
    assert set(extras) == {*EXTRAS.values(), "all"}
