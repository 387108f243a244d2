"""Which device computes."""

import torch

DEVICES = ("cpu", "cuda", "mps", "xpu")


def choose_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device called `name`, which may have a number (cuda:1); without one it is `local_rank`. `auto` is the GPU of
    any kind that is there, else the CPU.

    Raises ValueError naming a device that is unknown or not there.
    """
    gpu = torch.accelerator.current_accelerator(check_available=True)
    there = ["cpu"] if gpu is None or gpu.type not in DEVICES else ["cpu", gpu.type]
    kind, colon, number = (there[-1] if name == "auto" else name).partition(":")
    if kind not in there or (colon and (kind in ("cpu", "mps") or not number.isdecimal())):
        raise ValueError(f"device {name!r} is not here: this machine, with torch {torch.__version__}, has {there}")
    return torch.device(kind) if kind in ("cpu", "mps") else torch.device(kind, int(number or local_rank))


def widen(x: torch.Tensor) -> torch.Tensor:
    """`x` in float64, for sums that must not lose digits; in float32 on MPS, which has no float64."""
    return x.float() if x.device.type == "mps" else x.double()
