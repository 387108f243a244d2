"""How each SSD kernel is started: tokens per step, channels per program, warps, stages. A small table, by target.

The reasons behind the numbers are registers and shared memory, read off compilations for each target.
"""

from dataclasses import dataclass

SPAN = 128  # tokens between kept states


@dataclass(frozen=True)
class Launch:
    q: int  # tokens per step; divides SPAN
    p_tile: int  # channels of a head that a program holds
    num_warps: int
    num_stages: int


def n_tiles(n: int) -> tuple[int, int]:
    """d_state as two tiles (N1, N2), powers of two of at least 16; N2 is 0 where one is as good. 142 -> 128, 16."""
    whole = max(16, _power_of_two(n))
    first = max(16, whole // 2)
    if n <= first:
        return first, 0
    second = max(16, _power_of_two(n - first))
    return (first, second) if second < first else (whole, 0)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def launch_for(kernel: str, target: str, itemsize: int, p: int, n: int) -> Launch:
    p_tile = min(64, max(16, _power_of_two(p)))
    if kernel == "gradient":
        return Launch(64, p_tile, 8, 1)
    return Launch(64, p_tile, 4, 1)
