"""An installed package: the commands are the scripts, and what they read is installed with them."""

import shutil
import subprocess
import sys
import sysconfig
import tomllib

import pytest

from tests.test_extras import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment with the package installed as pip does, over the packages of this one."""
    folder = tmp_path_factory.mktemp("installed")
    for name in ("mamba2", "configs"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "LICENSE"):
        shutil.copy(file, folder / "source")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    packages = next((folder / "venv").glob("lib/python*/site-packages"))
    (packages / "these.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", folder / "venv/bin/python", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", folder / "source"], check=True)
    return folder


def command(installed, line: str, code: int = 0) -> subprocess.CompletedProcess:
    name, *options = line.split()
    script = installed / "venv/bin" / name
    result = subprocess.run([script, *options], cwd=installed, capture_output=True, text=True, timeout=300)
    assert result.returncode == code, result.stdout + result.stderr
    return result


@pytest.mark.slow
def test_the_commands_are_the_scripts(installed):
    models = "--config-path configs/tiny.json --initializations ones --output-path models"
    assert "models/seed-42-ones" in command(installed, f"mamba2-init {models}").stdout
    (installed / "a.txt").write_text("To be, or not to be. " * 20)
    step = "--batch-size 1 --gradient-accumulation-steps 1 --max-length 32 --max-steps 1 --wandb disabled"
    trained = f"mamba2-train --model-path models/seed-42-ones --dataset-path a.txt --output-dir out/seed-42-ones {step}"
    assert "revision unknown" in command(installed, trained).stdout
    command(installed, "mamba2-eval --model-base-path out --initializations ones --dataset-name a.txt")
    assert command(installed, "mamba2-generate out/seed-42-ones-final To --max-new-tokens 3").stdout.startswith("To")
    assert "error: --preset x: there is no" in command(installed, "mamba2-init --preset x", 2).stderr
    assert "no study at x.toml" in command(installed, "mamba2-train --study x.toml", 1).stderr


def test_every_package_is_installed():
    packages = {str(file.parent.relative_to(ROOT)).replace("/", ".") for file in (ROOT / "mamba2").rglob("*.py")}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert packages | set(settings["package-dir"]) == set(settings["packages"])
