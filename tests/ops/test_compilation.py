"""Every kernel compiles for every target, without a GPU: no spills, few registers, shared memory that there is."""

import os
import subprocess
import sys

import pytest

BLOCKS = """
from benchmarks.block_report import resources
for title, compiled in resources():
    for c in compiled:
        print(title, c.kernel, c.target, c.registers, c.spills, c.shared)
        assert c.fits and c.registers <= 128
"""
COMMANDS = {"convolution, norms and loss": ["-c", BLOCKS]}
COMMANDS |= {f"ssd, {shape}": ["-m", "benchmarks.kernel_report", "--resources", shape] for shape in ("study", "second")}


@pytest.mark.slow
@pytest.mark.parametrize("kernels", COMMANDS)
def test_every_kernel_fits_every_target(kernels):
    """In a process of its own: kernels decorated for the interpreter cannot be compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, *COMMANDS[kernels]]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "gfx942" in result.stdout and ("_step_kernel" if "ssd" in kernels else "softmax") in result.stdout
    steps = [line.split() for line in result.stdout.splitlines() if "_step_kernel" in line]
    assert all(int(registers) <= 128 for _, _, _, _, _, registers, *_ in steps)
