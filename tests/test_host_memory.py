"""Freed memory stays with the process, and a model that does not fit is refused before memory is allocated."""

import platform
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mamba2 import host_memory
from mamba2.host_memory import machine_memory
from mamba2.model import Mamba2LM, num_parameters
from tests.test_model import small_config

PAGES = 64 * 2**20 // resource.getpagesize()
# In its own process, because the setting cannot be undone, and without the package, whose import takes seconds.
PROGRAM = """
import resource, runpy, sys

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"1" * (64 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min(faults() for _ in range(4)))
assert runpy.run_path(sys.argv[1])["keep_freed_memory"]()
print(min(faults() for _ in range(4)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_pages_of_freed_memory_are_not_mapped_again():
    command = [sys.executable, "-c", PROGRAM, host_memory.__file__]
    before, after = map(int, subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split())
    assert before > PAGES // 2 and after < PAGES // 10


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux says there how much memory it has")
def test_the_memory_is_the_machines_or_what_a_container_may_have(monkeypatch, tmp_path):
    monkeypatch.setattr(host_memory, "CGROUP_LIMIT", tmp_path / "memory.max")
    total = 1024 * int(re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[1])
    assert machine_memory() == total
    for limit, expected in (("max", total), ("123456", 123456)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert machine_memory() == expected


WIDE = {"hidden_size": 32 * 10**7, "num_heads": 8 * 10**7}


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 10**8}, WIDE, {"vocab_size": 10**12}, {"state_size": 10**12}]
)
def test_a_model_that_the_machine_cannot_hold_is_refused_before_anything_is_allocated(monkeypatch, tmp_path, changes):
    config = small_config(**changes)
    size = f"{num_parameters(config):,} parameters takes {4 * num_parameters(config) / 1e9:,.1f} GB"
    with pytest.raises(MemoryError, match=size):
        Mamba2LM(config)
    Mamba2LM(small_config()).save_pretrained(tmp_path)
    config.save(tmp_path)
    with pytest.raises(MemoryError, match=size):
        Mamba2LM.from_pretrained(tmp_path)
    # with all memory in the world the files still do not hold such a model, and that is seen at once
    monkeypatch.setattr(host_memory, "machine_memory", lambda: 10**30)
    with pytest.raises(ValueError, match="safetensors does not fit its config"):
        Mamba2LM.from_pretrained(tmp_path)


def test_on_the_meta_device_a_model_takes_no_memory(monkeypatch):
    monkeypatch.setattr(host_memory, "machine_memory", lambda: 1)
    with torch.device("meta"):
        assert Mamba2LM(small_config()).lm_head.weight.is_meta
