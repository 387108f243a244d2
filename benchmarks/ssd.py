"""Time ssd on a GPU against mamba-ssm and flash-linear-attention, forward and forward with backward.

    python -m benchmarks.ssd

Each peer that is installed (pip install mamba-ssm, flash-linear-attention) runs in the same process on the same
tensors; the last column is its time over ours. Without a GPU there is nothing to time: `benchmarks.kernel_report`
counts what the kernels move instead.
"""

import importlib.util
import sys
from collections.abc import Callable

import torch

# batch, seqlen, nheads, headdim, ngroups, d_state: the study's model, Mamba-2's 780M and 2.7B, one long sequence.
SHAPES = [
    (32, 1024, 24, 32, 8, 142),
    (8, 2048, 48, 64, 1, 128),
    (4, 2048, 80, 64, 1, 128),
    (1, 16384, 24, 64, 1, 128),
]


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("benchmarks.ssd times kernels on a GPU, and torch sees none here")
    import triton

    from mamba2.ops import ssd

    peers: dict[str, Callable] = {"mamba2": lambda i: ssd(**i, chunk_size=256, dt_softplus=True)}
    if importlib.util.find_spec("mamba_ssm"):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        peers["mamba-ssm"] = lambda i: mamba_chunk_scan_combined(**i, chunk_size=256, dt_softplus=True)
    if importlib.util.find_spec("fla"):
        peers["flash-linear-attention"] = _simple_gla
    for name in ("mamba-ssm", "flash-linear-attention"):
        if name not in peers:
            print(f"{name} is not installed and does not take part")

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, bfloat16")
    print(f"{'b, l, h, p, g, n':28} {'':24} {'forward ms':>10} {'ratio':>6} {'with backward ms':>17} {'ratio':>6}")
    for shape in SHAPES:
        inputs = _inputs(*shape)
        times = {name: _time(function, inputs) for name, function in peers.items()}
        ours = times["mamba2"]
        for name, (forward, both) in times.items():
            print(
                f"{shape!s:28} {name:24} {forward:10.3f} {forward / ours[0]:6.2f} {both:17.3f} {both / ours[1]:6.2f}",
                flush=True,
            )


def _time(function: Callable, inputs: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Milliseconds of a forward pass without gradients, and of one with its backward pass."""
    from triton.testing import do_bench

    gradient = torch.randn_like(inputs["x"])
    with torch.no_grad():
        forward = do_bench(lambda: function(inputs))
    return forward, do_bench(lambda: function(inputs).backward(gradient), grad_to_none=list(inputs.values()))


def _inputs(b: int, l: int, h: int, p: int, g: int, n: int) -> dict[str, torch.Tensor]:
    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device="cuda").requires_grad_()

    return {
        "x": normal(b, l, h, p),
        "dt": normal(b, l, h),
        "A": (-torch.rand(h, device="cuda") * 15 - 1).requires_grad_(),
        "B": normal(b, l, g, n),
        "C": normal(b, l, g, n),
        "D": normal(h, dtype=torch.float32),
        "dt_bias": (torch.rand(h, device="cuda") - 5).requires_grad_(),
    }


def _simple_gla(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """SSD as gated linear attention with a scalar decay per head: queries C, keys B, values dt x, log decay dt A."""
    from fla.ops.simple_gla import chunk_simple_gla

    x, B, C = inputs["x"], inputs["B"], inputs["C"]
    dt = torch.nn.functional.softplus(inputs["dt"].float() + inputs["dt_bias"])  # (b, l, h)
    heads = x.shape[2] // B.shape[2]
    keys, queries = (t.repeat_interleave(heads, dim=2) for t in (B, C))  # (b, l, h, n)
    y, _ = chunk_simple_gla(queries, keys, (x * dt[..., None]).to(x.dtype), g=dt * inputs["A"], scale=1.0)
    return y + (x * inputs["D"][:, None]).to(x.dtype)


if __name__ == "__main__":
    main()
