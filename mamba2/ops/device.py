"""What launchers ask of the device that a tensor is on. The interpreter, which has none, stands for an H100."""

from functools import cache

import torch


@cache
def target_of(device: torch.device) -> str:
    """The name by which tables of launches know the device: sm_90, gfx942, …"""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once at least."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


# Float32 elements per thread: half a megabyte, half of a second-level cache of today. Measured: with a quarter of the
# cache, starting operations costs more than is saved; with all of it float32 is slower again.
CACHED_ELEMENTS = 2**17


def block_elements(device: torch.device) -> int:
    """Elements of the largest intermediate that a torch form should make at once.

    On a processor about what the second-level caches of its cores hold in float32, so that the next operation finds it
    there; elsewhere as much as keeps the device busy.
    """
    return CACHED_ELEMENTS * torch.get_num_threads() if device.type == "cpu" else 2**26
