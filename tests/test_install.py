"""An installed package: the commands are the scripts, and what they read is installed with them."""

import shutil
import subprocess
import sys
import sysconfig
import tomllib

import pytest

from tests.test_extras import ROOT

NAMES = ("init", "train", "eval", "generate")


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


COMMANDS = """
import sys
from mamba2.cli import installed

step = "--batch-size 1 --gradient-accumulation-steps 1 --max-length 32 --max-steps 1 --wandb disabled"
for line in (
    f"train --model-path models/seed-42-ones --dataset-path a.txt --output-dir out/seed-42-ones {step}",
    "eval --model-base-path out --initializations ones --dataset-name a.txt",
    "generate out/seed-42-ones-final To --max-new-tokens 3",
    "init --study x.toml",
):
    sys.argv = f"/any/bin/mamba2-{line}".split()
    installed()
"""


@pytest.mark.slow
def test_the_commands_are_the_scripts(installed):
    programs = installed / "venv/bin"
    assert {file.name for file in programs.glob("mamba2-*")} == {f"mamba2-{name}" for name in NAMES}
    models = "--config-path configs/tiny.json --initializations ones --output-path models"
    first = subprocess.run([programs / "mamba2-init", *models.split()], cwd=installed, capture_output=True, text=True)
    assert "wrote models/seed-42-ones" in first.stdout, first.stderr
    (installed / "a.txt").write_text("To be, or not to be. " * 20)
    # All in one process, for starting one takes longer than what these do.
    others = [programs / "python", "-c", COMMANDS]
    result = subprocess.run(others, cwd=installed, capture_output=True, text=True, timeout=300)
    assert "revision unknown" in result.stdout and (installed / "perplexity_results.json").is_file(), result.stderr
    assert result.stdout.splitlines()[-1].startswith("To") or "\nTo" in result.stdout
    assert (result.returncode, result.stderr.splitlines()[-1][:26]) == (1, "error: no study at x.toml:")


@pytest.mark.slow
def test_a_checkout_installed_to_be_changed_has_the_commands(installed):
    pip = [sys.executable, "-m", "pip", "--python", installed / "venv/bin/python", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--editable", installed / "source"], check=True)
    with open(installed / "source/init.py", "a") as script:
        script.write('print("this is the checkout")\n')
    listed = subprocess.run([installed / "venv/bin/mamba2-init", "--list"], cwd="/", capture_output=True, text=True)
    assert listed.stdout.startswith("this is the checkout\n") and "log_uniform" in listed.stdout, listed.stderr


def test_every_package_is_installed():
    packages = {str(file.parent.relative_to(ROOT)).replace("/", ".") for file in (ROOT / "mamba2").rglob("*.py")}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert packages | set(settings["package-dir"]) == set(settings["packages"])
