"""Every op's values and gradients on the device: against float64, against mamba-ssm, and against a repeated run.

The bound is twice that of the tests (an error of at most twice that of the plain torch form in the same dtype), because
the tests have not seen these shapes and orders of sums.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from benchmarks import pretend
from benchmarks.gpu.worker import Bench, Case, Wrong
from mamba2.ops import linear_cross_entropy, ssd, ssd_step
from tests.ops import kernel_checks as checks
from tests.ops import test_conv1d_triton as conv
from tests.ops import test_cross_entropy_triton as loss
from tests.ops import test_norm_triton as norm
from tests.ops import test_ssd_step as step
from tests.ops.test_ssd import MAMBA_SSM_CASES, documents, make_inputs, mamba_ssm_inputs
from tests.ops.test_ssd import run as run_ssd
from tests.oracles import mamba_ssm_environment, mamba_ssm_scan

# (b, l, h, p, g, n); no l is a multiple of the chunk size. The first has the study's p and n, the last 3 head tiles.
SHAPES = [(1, 300, 6, 32, 2, 142), (2, 257, 4, 64, 1, 128), (1, 130, 3, 16, 3, 143), (1, 70, 4, 48, 2, 256)]
FORMS = {"one segment": 1, "many segments": 10**6}  # multiprocessors that the launcher is told of
SANITIZER_SECONDS = 50


def cases(bench: Bench) -> dict[str, Case]:
    found: dict[str, Case] = {}
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    shapes = [(1, 140, 2, 16, 1, 20)] if bench.rehearse else SHAPES
    for title, dtype in dtypes.items():
        for form, count in FORMS.items():
            for shape in shapes:
                for everything in (True,) if bench.rehearse else (False, True):
                    name = f"ssd {shape}, {title}, {form}" + ", documents, gate, states" * everything
                    found[name] = lambda a=(shape, dtype, count, everything): ssd_accuracy(*a)
        for name, (op, inputs) in block_ops(dtype, bench.rehearse).items():
            found[f"{name}, {title}"] = lambda op=op, inputs=inputs: judged(op, inputs())
    for name in list(MAMBA_SSM_CASES)[: 1 if bench.rehearse else None]:
        found[f"ssd beside mamba-ssm, {name}"] = lambda name=name: beside_mamba_ssm(name, bench.device)
    found["repeated runs of ssd"] = lambda: repeated(bench)
    for name in ("x", "B"):
        found[f"ssd, offsets of {name} past 2**31"] = lambda name=name: far(name)
    found["compute-sanitizer, memcheck"] = lambda: sanitizer(bench)
    return found


def judged(op: Callable, inputs: dict[str, torch.Tensor | None]) -> dict[str, float | str]:
    with pytest.MonkeyPatch.context() as patch:
        found = checks.accuracy(patch, op, inputs)
    name, (ours, theirs, bound) = max(found.items(), key=lambda item: item[1][0] / item[1][2])
    values = {"worst": name, "error": ours, "torch's": theirs, "bound": 2 * bound}
    wrong = {name: errors for name, errors in found.items() if not errors[0] <= 2 * errors[2]}
    if wrong:
        raise Wrong({**values, "over their bounds": {name: errors[0] for name, errors in wrong.items()}})
    return values


def ssd_tensors(shape: tuple[int, ...], dtype: torch.dtype, everything: bool) -> dict[str, torch.Tensor]:
    optional = ("D", "z", "dt_bias", "initial_states") if everything else ("D", "dt_bias")
    inputs = make_inputs(*shape, dtype=dtype, optional=optional, D_per_channel=everything)
    return {name: tensor.detach().to(checks.DEVICE) for name, tensor in inputs.items()}


def ssd_op(seq_idx: torch.Tensor | None = None) -> Callable:
    def op(**tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"dt_softplus": True, "dt_limit": (0.001, 1.0), "return_final_states": True}
        return ssd(**tensors, chunk_size=64, seq_idx=seq_idx, **options)

    return op


def ssd_accuracy(shape: tuple[int, ...], dtype: torch.dtype, count: int, everything: bool) -> dict:
    seq_idx = documents(*shape[:2]).to(checks.DEVICE) if everything else None
    with pretend.multiprocessors(count):
        return judged(ssd_op(seq_idx), ssd_tensors(shape, dtype, everything))


def block_ops(dtype: torch.dtype, tiny: bool) -> dict[str, tuple[Callable, Callable]]:
    """The other ops: a function of the inputs, and what makes these."""
    l = 9 if tiny else 257

    def one_step(state: torch.Tensor, **tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = state.clone()
        return ssd_step(state, **tensors, dt_softplus=True), state

    def no_gradients(op: Callable) -> Callable:
        def function(**tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                outputs = op(**{k: t if t is None else t.detach() for k, t in tensors.items()})
            return tuple(y.requires_grad_() for y in outputs)

        return function

    return {
        "convolution": (conv.op(conv.documents(2, l)), lambda: conv.make_inputs(2, l, 142, 4, dtype)),
        "norm of a sum": (norm.add, lambda: norm.make_add(2, l, 142, dtype=dtype)),
        "gated norm": (norm.gated(8), lambda: norm.make_gated(2, l, 768, dtype=dtype)),
        "loss": (
            lambda **t: linear_cross_entropy(**t, targets=loss.make_targets(l, 5000)),
            lambda: loss.make_inputs(l, 64, 5000, dtype),
        ),
        "step": (
            no_gradients(one_step),
            lambda: step.make_inputs(3, 24, 32, 8, 142, dtype, D=1, dt_bias=True),
        ),
    }


def beside_mamba_ssm(name: str, device: torch.device) -> dict[str, float]:
    """float32: our error and theirs against the recurrence in float64."""
    inputs, options = mamba_ssm_inputs(name)
    options["seq_idx"] = None if options["seq_idx"] is None else options["seq_idx"].to(device)

    def moved(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {k: t.detach().to(device, dtype).requires_grad_() for k, t in inputs.items()}

    with mamba_ssm_environment():
        theirs = run_ssd(mamba_ssm_scan(), moved(torch.float32), **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAMBA2_BACKEND", "reference")
        expected = run_ssd(ssd, moved(torch.float64), **options)
        patch.setenv("MAMBA2_BACKEND", "triton")
        ours = run_ssd(ssd, moved(torch.float32), **options)
    worst = [max(checks.relative_errors(result, expected).values()) for result in (ours, theirs)]
    values = dict(zip(("error", "mamba-ssm's"), worst))
    if not worst[0] <= max(1e-4, 2 * worst[1]):
        raise Wrong(values)
    return values


def repeated(bench: Bench) -> dict[str, int]:
    """Many programs at once, five times: results must be equal to the bit."""
    shape = (1, 17, 2, 16, 1, 20) if bench.rehearse else (16, 1024, 24, 32, 8, 142)
    inputs = ssd_tensors(shape, torch.bfloat16, everything=False)
    first = checks.run(ssd_op(), inputs)
    for _ in range(1 if bench.rehearse else 4):
        again = checks.run(ssd_op(), inputs)
        different = [name for name in first if not torch.equal(first[name], again[name])]
        if different:
            raise Wrong({"different": different})
    return {"results compared": len(first)}


def far(name: str) -> dict[str, int]:
    """Results must be equal to the bit where two sequences lie more than 2**31 elements apart."""
    inputs = ssd_tensors((2, 40, 2, 16, 1, 20), torch.bfloat16, everything=False)
    near, far = (checks.run(ssd_op(), {**inputs, name: t}) for t in (inputs[name], checks.far_apart(inputs[name], 0)))
    different = [key for key in near if not torch.equal(near[key], far[key])]
    if different:
        raise Wrong({"different": different})
    return {"results compared": len(near)}


def sanitizer(bench: Bench) -> dict[str, str]:
    """One small call of each kernel under compute-sanitizer, where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if bench.compiling or tool is None:
        return {"memcheck": "not run: compute-sanitizer is not on this machine"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu.worker"]
    command += ["kernels", "1", "run", "1", str(bench.work), str(bench.output)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SANITIZER_SECONDS, env=os.environ)
    except subprocess.TimeoutExpired as expired:
        done = (expired.stdout or b"").count(b'"status"')
        return {"memcheck": f"no error in {done} cases in {SANITIZER_SECONDS} s"}
    errors = [line.removeprefix("=========").strip() for line in result.stdout.splitlines() if "Invalid" in line]
    if result.returncode == 9 or errors:
        raise Wrong({"memcheck": errors[:5] or result.stdout[-300:]})
    return {"memcheck": f"no error in {result.stdout.count(chr(34) + 'status' + chr(34))} cases"}
