"""Freed memory stays with the process: a second step does not have its pages mapped anew."""

import platform
import resource
import subprocess
import sys

import pytest

PAGES = 64 * 2**20 // resource.getpagesize()
PROGRAM = """
import resource, sys
import torch
from mamba2.host_memory import keep_freed_memory

if "keep" in sys.argv:
    assert keep_freed_memory()
faults = []
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 * 2**20, dtype=torch.uint8)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


def faults(*arguments: str) -> int:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_pages_of_freed_tensors_are_not_mapped_again():
    assert faults() > PAGES // 2
    assert faults("keep") < PAGES // 10
