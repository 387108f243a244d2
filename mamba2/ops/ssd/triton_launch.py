"""How each SSD kernel is started: channels per program, warps, stages, a bound on registers. A small table, by target.

The reasons behind it are registers and shared memory, read off compilations for each target
(`python -m benchmarks.kernel_report`): nothing spills, and at least two programs of four warps, or one of eight, share
a multiprocessor. MAMBA2_AUTOTUNE=1 times a few neighbours on the device at hand in place of it (`mamba2.ops.autotune`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton

from mamba2.ops.autotune import autotuning, fastest


@dataclass(frozen=True)
class Launch:
    p_tile: int  # channels of a head that a program holds
    num_warps: int
    num_stages: int  # of the loop over chunks, where the kernel has one
    # At most, per thread; CUDA only. Said even where it is all there are: left to itself, ptxas at times spills a few
    # bytes to get down to 96 or 128.
    registers: int = 255

    def options(self, target: str) -> dict[str, int]:
        options = {"num_warps": self.num_warps, "num_stages": 1}  # of loops that say nothing
        return options if target.startswith("gfx") else {**options, "maxnreg": self.registers}


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


def chunk_for(itemsize: int) -> int:
    """Tokens that are multiplied out at a time, by every kernel.

    At 64, operands of mma.sync fill the registers of sm_80 and sm_120, and Triton 3.7.1 fails to place tensor memory on
    sm_100; float32 operands without rounding are multiplied by ordinary instructions, and fit at 16.
    """
    return 32 if itemsize == 2 else 16


# The two walks (scan and reverse), 16-bit inputs. They hold a state of (d_state, p_tile) in float32 beside the operands
# of four products.
#   sm_90, sm_100  32 channels, loads one chunk ahead through shared memory; on sm_90 168 registers are enough, so that
#                  three programs share a multiprocessor
#   sm_80, sm_120  operands of mma.sync live in registers: 16 channels, no loads ahead
#   gfx942         512 registers per lane, of which these take up to 224: two programs on a compute unit
WALKS = {
    "sm_80": Launch(16, 4, 1),
    "sm_90": Launch(32, 4, 2, 168),
    "sm_100": Launch(32, 4, 2),
    "sm_120": Launch(16, 4, 1),
    "gfx942": Launch(32, 4, 1),
}


def launch_for(kernel: str, target: str, itemsize: int, p: int, n: int, plain: bool = True) -> Launch:
    """The table. `kernel` is scan, states, reverse or gradient; `plain`: no gate, no documents, over whole sequences.

    A target that is not in the table takes the row of the nearest one that is.
    """
    target = nearest(target)
    earlier = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)  # needs a few registers more in places
    widest = max(16, triton.next_power_of_2(p))
    wide = n > 160  # one more doubling of the state: half the channels, or twice the warps
    if itemsize == 4:
        return Launch(16, 8 if kernel == "scan" else 4, 1)
    if kernel in ("states", "reverse"):
        return Launch(min(32, widest), 4, 1)
    if kernel == "gradient":
        # Two accumulators of (d_state, chunk), and where d_state takes two tiles more than 255 registers in places.
        short = target in ("sm_80", "sm_120") or (target != "gfx942" and not plain) or (earlier and target == "sm_90")
        eight = wide or (n_tiles(n)[1] > 0 and short) or (earlier and target == "sm_80")
        return Launch(16 if wide else min(32, widest), 8 if eight else 4, 2 if target in ("sm_90", "sm_100") else 1)
    if target == "gfx942":
        return replace(WALKS[target], p_tile=16 if wide else min(32, widest))
    ahead = target in ("sm_90", "sm_100")
    if wide or not plain:
        if n_tiles(n)[1] > 0 and not ahead:  # found by trying: no rule says why sm_80 takes 32 channels more easily
            return Launch(min(widest, 32 if target == "sm_80" and not earlier else 16), 8, 1)
        if wide:
            return Launch(16, 8, 2 if ahead else 1)
        if n_tiles(n)[1] > 0:  # no loads ahead: their addresses would be spilled
            return Launch(min(32, widest), 4, 1)
        if not ahead:
            return Launch(16, 4, 1)
        if earlier:
            return replace(WALKS[target], p_tile=min(32, widest), registers=255)
    return replace(WALKS[target], p_tile=min(WALKS[target].p_tile, widest))


def nearest(target: str) -> str:
    if target in WALKS:
        return target
    if target.startswith("gfx"):
        return "gfx942"
    return "sm_100" if target.startswith("sm_10") else "sm_120"  # the row that asks least of a device


def choose_launch(
    kernel: str,
    target: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int, int, int],
    plain: bool,
    programs: int,
    start: Callable[[Launch], object],
) -> Launch:
    """The table's launch, or with MAMBA2_AUTOTUNE=1 the fastest of its neighbours; `start` runs the kernel with one.

    `sizes` are b, l, h, p, g, n. `programs` are the fewest that the launch must have: a sequential form was chosen
    since the table's launch has as many, and stays right with these.
    """
    b, l, h, p, g, n = sizes
    launch = launch_for(kernel, target, dtype.itemsize, p, n, plain)
    if not autotuning():
        return launch
    form = "plain" if plain else "with gate, documents or spans"
    shape = f"batch {b}, length to {triton.next_power_of_2(l)}, {h} heads of {p}, {g} groups, d_state {n}"
    key = f"ssd {kernel}, {target}, {dtype}, {shape}, {form}, triton {triton.__version__}"
    tried = [other for other in neighbours(launch, target) if b * h * triton.cdiv(p, other.p_tile) >= programs]
    return fastest(key, tried, start)


def neighbours(launch: Launch, target: str) -> list[Launch]:
    """What autotuning tries: the launch itself, then one thing changed at a time."""
    others = [
        replace(launch, num_stages=3 - launch.num_stages),
        replace(launch, num_warps=12 - launch.num_warps),
        replace(launch, p_tile=32 if launch.p_tile == 16 else 16),
    ]
    if not target.startswith("gfx"):
        others.append(replace(launch, registers=168 if launch.registers == 255 else 255))  # spills show in the time
    return [launch, *others]
