"""Times of ssd: both of our forms, mamba-ssm, flash-linear-attention, in one run on the same tensors.

For ours also the time of each kernel, by the profiler, beside an estimate from what `benchmarks.kernel_report` counted:
the larger of its bytes by the device's copy speed and its operations by the speed of a large product, measured here.
"""

import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import pretend
from benchmarks.gpu.kernels import ceilings
from benchmarks.gpu.right import FORMS
from benchmarks.gpu.worker import Bench, Case
from benchmarks.kernel_report import floor
from mamba2.ops import ssd
from tests.oracles import mamba_ssm_environment, mamba_ssm_scan

# b, l, h, p, g, n: the study's model with one and all of its windows, 130m, 2.7b with a long and a very long sequence,
# and the shape of published figures for fused kernels.
SHAPES = [
    (8, 1024, 24, 32, 8, 142),
    (58, 1024, 24, 32, 8, 142),
    (8, 2048, 24, 64, 1, 128),
    (1, 8192, 80, 64, 1, 128),
    (1, 4096, 128, 64, 1, 128),
    (1, 65536, 80, 64, 1, 128),
]
COUNTS = Path(__file__).parents[2] / "docs" / "kernel-counts.json"


def cases(bench: Bench) -> dict[str, Case]:
    found: dict[str, Case] = {}
    for shape in [(1, 9, 2, 16, 1, 20)] if bench.rehearse else SHAPES:
        for training in (False, True):
            # In training: with documents and final states.
            title = f"{shape}, {'documents' if training else 'plain'}"
            for form, count in FORMS.items():
                found[f"mamba2 {form}, {title}"] = functools.partial(ours, bench, shape, training, form, count)
            if bench.rehearse and training:
                continue  # takes 15 s in the interpreter and shows no more than the plain form
            found[f"mamba-ssm, {title}"] = functools.partial(peer, bench, "mamba_ssm", shape, training)
            if not training:
                found[f"flash-linear-attention, {title}"] = functools.partial(peer, bench, "fla", shape, training)
    return found


def make_tensors(shape: tuple[int, ...], device: torch.device, training: bool) -> dict[str, torch.Tensor]:
    """x, B and C side by side as the convolution leaves them, in bfloat16; parameters in float32."""
    b, l, h, p, g, n = shape
    torch.manual_seed(0)
    x, B, C = torch.randn(b, l, h * p + 2 * g * n, device=device).bfloat16().split([h * p, g * n, g * n], dim=-1)
    tensors = {
        "x": x.unflatten(-1, (h, p)),
        "dt": torch.randn(b, l, h, device=device).bfloat16(),
        "A": -torch.rand(h, device=device) * 15 - 1,
        "B": B.unflatten(-1, (g, n)),
        "C": C.unflatten(-1, (g, n)),
        "D": torch.ones(h, device=device),
        "dt_bias": torch.rand(h, device=device) - 5,
    }
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    if training:
        tensors["seq_idx"] = (torch.arange(l, device=device) // 700).expand(b, l).int().contiguous()
    return tensors


def measure(bench: Bench, shape: tuple[int, ...], function: Callable, tensors: dict) -> dict[str, float | str]:
    """Milliseconds forward, backward alone, and both; bytes of the floor by time, GB/s. An error in a
    backward pass becomes a value of the row and does not end the case."""
    b, l = shape[:2]
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    with torch.no_grad():
        forward = bench.milliseconds(lambda: function(tensors))
    least = [b * l * value / 1e6 for value in floor(*shape[1:])]
    values: dict[str, float | str] = {"forward ms": forward, "forward GB/s": least[0] / max(forward, 1e-9)}
    try:
        y = function(tensors)
        gradient = torch.randn_like(y)
        backward = bench.milliseconds(lambda: torch.autograd.grad(y, leaves, gradient, retain_graph=True))
        both = bench.milliseconds(lambda: torch.autograd.grad(function(tensors), leaves, gradient))
    except Exception as error:
        return {**values, "backward": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    return {**values, "backward ms": backward, "backward GB/s": least[1] / max(backward, 1e-9), "both ms": both}


def ours(bench: Bench, shape: tuple[int, ...], training: bool, form: str, count: int) -> dict:
    def function(tensors: dict) -> torch.Tensor:
        y = ssd(**tensors, chunk_size=256, dt_softplus=True, return_final_states=training)
        return y[0] if training else y

    tensors = make_tensors(shape, bench.device, training)
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    with pretend.multiprocessors(count):
        values = measure(bench, shape, function, tensors)
        times = bench.kernel_milliseconds(lambda: torch.autograd.grad(function(tensors).sum(), leaves))
    speed = measured_ceilings(bench)
    expected = estimates(shape, "documents" if training else "plain", form, speed)
    kernels = {
        name: f"{1e3 * times[name]:.1f} us, estimated {1e3 * expected.get(name, float('nan')):.1f}"
        for name in times
        if name.startswith("_")
    }
    return {**values, "kernels": kernels}


@functools.cache
def measured_ceilings(bench: Bench) -> dict[str, float]:
    return {} if bench.compiling else ceilings(bench)


def estimates(shape: tuple[int, ...], form: str, walk: str, speed: dict[str, float]) -> dict[str, float]:
    """Milliseconds of one launch of each kernel, from what was counted per token at the same h, p, g and n."""
    counted = json.loads(COUNTS.read_text(encoding="utf-8"))["launches"]
    key = {"shape": list(shape[2:]), "form": form, "walk": walk}
    result: dict[str, float] = {}
    for launch in counted if speed else ():
        if {name: launch[name] for name in key} == key:
            tokens = shape[0] * shape[1]
            seconds = max(
                launch["dram"] * tokens / (speed["copy GB/s"] * 1e9),
                launch["flops"] * tokens / (speed["product TFLOP/s"] * 1e12),
            )
            result[launch["kernel"]] = result.get(launch["kernel"], 0.0) + 1e3 * seconds
    return result


def peer(bench: Bench, package: str, shape: tuple[int, ...], training: bool) -> dict:
    if importlib.util.find_spec(package) is None:
        return {"not run": f"{package} is not installed"}
    with mamba_ssm_environment():
        tensors = make_tensors(shape, bench.device, training)
        return measure(bench, shape, {"mamba_ssm": mamba_ssm, "fla": simple_gla}[package], tensors)


def mamba_ssm(tensors: dict) -> torch.Tensor:
    training = "seq_idx" in tensors
    y = mamba_ssm_scan()(**tensors, chunk_size=256, dt_softplus=True, return_final_states=training)
    return y[0] if training else y


def simple_gla(tensors: dict) -> torch.Tensor:
    """SSD as gated linear attention with a scalar decay per head: queries C, keys B, values dt x, log decay dt A."""
    from fla.ops.simple_gla import chunk_simple_gla

    x, B, C = tensors["x"], tensors["B"], tensors["C"]
    dt = torch.nn.functional.softplus(tensors["dt"].float() + tensors["dt_bias"])  # (b, l, h)
    heads = x.shape[2] // B.shape[2]
    keys, queries = (t.repeat_interleave(heads, dim=2) for t in (B, C))  # (b, l, h, n)
    y, _ = chunk_simple_gla(queries, keys, (x * dt[..., None]).to(x.dtype), g=dt * tensors["A"], scale=1.0)
    return y + (x * tensors["D"][:, None]).to(x.dtype)
