"""The kernels of convolution, norms and loss compile for every target, without a GPU: no spills, few registers."""

import os
import subprocess
import sys

import pytest

# Kernels decorated under the interpreter cannot be compiled: that needs a process of its own.
SCRIPT = """
from benchmarks.block_report import resources
for title, compiled in resources():
    for c in compiled:
        print(title, c.kernel, c.target, c.registers, c.spills, c.shared)
        assert c.fits and c.registers <= 128
"""


@pytest.mark.slow
def test_every_kernel_fits_every_target():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-200:] + result.stderr[-2000:]
    assert "softmax" in result.stdout and "gfx942" in result.stdout
