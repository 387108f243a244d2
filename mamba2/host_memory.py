"""Memory of the machine: how much there is, and whether the C library keeps what a step frees."""

import ctypes
import os
import platform
import sys
from pathlib import Path

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next allocation. Returns False if the C library is not glibc.

    By default glibc returns large blocks to the system, which then clears and maps every page of every activation again
    in each step. On a CPU this takes a twentieth of a float32 training step and a quarter of a fused bf16 one. The
    setting holds for the whole process, so scripts call this, not library code.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) and libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1))


def machine_memory() -> int:
    """Bytes of memory that this process can have: the machine's, or the limit of its container if that is lower. On
    Windows, which does not say, any number fits."""
    if not hasattr(os, "sysconf"):
        return sys.maxsize
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP_LIMIT.read_text(encoding="ascii").strip() if CGROUP_LIMIT.is_file() else "max"
    return total if limit == "max" else min(total, int(limit))


def require_memory(parameters: int, itemsize: int) -> None:
    """Raise MemoryError if so many parameters of `itemsize` bytes do not fit, before anything is allocated for them."""
    needed, there = parameters * itemsize, machine_memory()
    if needed > there:
        raise MemoryError(
            f"a model of {parameters:,} parameters takes {needed / 1e9:,.1f} GB, "
            f"and this machine has {there / 1e9:,.1f} GB"
        )
