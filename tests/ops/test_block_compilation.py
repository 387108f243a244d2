"""The kernels of convolution, norms and loss compile for every target, without a GPU: no spills, few registers."""

import os
import subprocess
import sys

import pytest

from benchmarks import compilation

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


def test_scratch_memory_counts_as_spilled_where_an_instruction_touches_it():
    usage = "    .private_segment_fixed_size: 36\n    .vgpr_count:     206\n    .vgpr_spill_count: 0\n"
    assert compilation._amd_usage(usage) == (206, 0)
    assert compilation._amd_usage("\tscratch_store_dword off, v2, off offset:32\n" + usage) == (206, 36)
