"""What the C library does with memory that a step gives back."""

import ctypes
import platform

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next allocation. Returns False where the C library is another one.

    By default it hands large blocks back to the system, and each step then has every page of every activation cleared
    and mapped anew: a twentieth of a float32 training step on a processor, a quarter of a fused bf16 one. For the whole
    process, so it is for a script to ask for.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) and libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1))
