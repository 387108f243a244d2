"""How each SSD kernel is started: channels per program, warps, stages, a bound on registers. A small table, by target.

CHUNK tokens are multiplied out at a time, by every kernel: at 64, operands of mma.sync fill the registers of sm_80 and
sm_120, and Triton 3.7.1 fails to place tensor memory on sm_100. Longer runs come from the span, whose tokens share one
kept state.

The reasons behind the table are registers and shared memory, read off compilations for each target
(`python -m benchmarks.kernel_report`): no configuration spills, and two or more programs fit a multiprocessor.
MAMBA2_AUTOTUNE=1 times a few neighbours on the device at hand in place of it (`mamba2.ops.autotune`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton

from mamba2.ops.autotune import autotuning, fastest

CHUNK = 32


@dataclass(frozen=True)
class Launch:
    p_tile: int  # channels of a head that a program holds
    num_warps: int
    num_stages: int  # of the loop over chunks, where the kernel has one
    registers: int | None = None  # at most, per thread; None leaves it to the compiler. CUDA only.

    def options(self) -> dict[str, int]:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.registers is None else {**options, "maxnreg": self.registers}


def span_for(nheads: int, ngroups: int) -> int:
    """Tokens between kept states.

    The states' traffic falls with it; the products of pairs of tokens grow with it, and those of B and C cost once per
    group: 256 where many heads share a group, else 128.
    """
    return 256 if nheads >= 8 * ngroups else 128


def n_tiles(n: int) -> tuple[int, int]:
    """d_state as two tiles (N1, N2), powers of two of at least 16; N2 is 0 where one is as good. 142 -> 128, 16."""
    whole = max(16, triton.next_power_of_2(n))
    first = max(16, whole // 2)
    if n <= first:
        return first, 0
    second = max(16, triton.next_power_of_2(n - first))
    return (first, second) if second < first else (whole, 0)


def launch_for(kernel: str, target: str, itemsize: int, p: int, n: int) -> Launch:
    """The table. `kernel` is scan, reverse, states or gradient."""
    p_tile = min(32, max(16, triton.next_power_of_2(p)))
    return Launch(p_tile, 4, 1)


def choose_launch(
    kernel: str, target: str, dtype: torch.dtype, p: int, n: int, start: Callable[[Launch], object]
) -> Launch:
    """The table's launch, or with MAMBA2_AUTOTUNE=1 the fastest of its neighbours; `start` runs the kernel with one."""
    launch = launch_for(kernel, target, dtype.itemsize, p, n)
    if not autotuning():
        return launch
    key = f"ssd {kernel}, {target}, {dtype}, headdim {p}, d_state {n}, triton {triton.__version__}"
    return fastest(key, neighbours(launch), start)


def neighbours(launch: Launch) -> list[Launch]:
    """What autotuning tries: the launch itself, then one thing changed at a time."""
    others = [
        replace(launch, num_stages=3 - launch.num_stages),
        replace(launch, num_warps=12 - launch.num_warps),
        replace(launch, registers=None if launch.registers else 168),
        replace(launch, p_tile=32 if launch.p_tile == 16 else 16),
    ]
    return [launch, *others]
