"""The device's speed of a product and of a copy, then each kernel alone: launched with arguments that were recorded in
the interpreter, and its results compared with the interpreter's."""

import importlib
import os
import subprocess
import sys

import torch

from benchmarks.gpu.record import decoded, tensors_of
from benchmarks.gpu.worker import Bench, Case, Wrong
from benchmarks.train_step import matmul_peak
from mamba2.ops.kernel import target_of

# Sums by scans and reductions in one kernel have failed on Hopper elsewhere (fla-org/flash-linear-attention#734).
FIRST = ("_decays_kernel", "_decays_gradient_kernel")
# Bounds of a result's relative error, by dtype. Products of 16-bit operands are exact; sums are in another order.
BOUNDS = {torch.float32: 2e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.int32: 0.0}


def cases(bench: Bench) -> dict[str, Case]:
    path = bench.work / "launches.pt"
    if not path.exists():
        environment = {"TRITON_INTERPRET": "1", "MAMBA2_BACKEND": "triton", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "benchmarks.gpu.record", str(path), target_of(bench.device)]
        command += ["tiny"] * bench.rehearse
        subprocess.run(command, env={**os.environ, **environment}, check=True, stdout=sys.stderr)
    launches = torch.load(path, map_location=bench.device, weights_only=True)
    launches.sort(key=lambda launch: launch["kernel"][1] not in FIRST)
    names: dict[str, Case] = {"ceilings": lambda: ceilings(bench)}
    for launch in launches:
        name, again = launch["case"], 2
        while name in names:
            name, again = f"{launch['case']}, {again}", again + 1
        names[name] = lambda launch=launch: start(launch)
    return names


def ceilings(bench: Bench) -> dict[str, float]:
    """A large product of bfloat16, TFLOP/s, and a large copy, GB/s counting what is read and written."""
    if bench.rehearse:
        return {"product TFLOP/s": 1.0, "copy GB/s": 1.0}
    source = torch.empty(2**30, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / bench.milliseconds(lambda: target.copy_(source)) / 1e6
    return {"product TFLOP/s": matmul_peak(torch.bfloat16, bench.device) / 1e12, "copy GB/s": copy}


def start(launch: dict) -> dict[str, float]:
    module, name = launch["kernel"]
    args, kwargs = decoded(launch["before"][0]), launch["before"][1]
    getattr(importlib.import_module(module), name)[launch["grid"]](*args, **kwargs)
    torch.cuda.synchronize()
    pairs = list(zip(tensors_of(args), launch["after"], strict=True))
    worst = max(error(left, after) / (BOUNDS.get(after.dtype, 0.0) or 1e-9) for left, after in pairs)
    values = {"error / bound": worst}
    if not worst <= 1.0:
        raise Wrong({**values, "by argument": [round(error(left, after), 6) for left, after in pairs]})
    return values


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error by the norm; infinite where one is finite and the other is not."""
    actual, expected = actual.double(), expected.double()
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return float("inf")
    difference = (actual - expected)[finite].norm()
    return float(difference / expected[finite].norm().clamp(min=1e-6))
