"""Record the arguments and results of every kernel launch in small calls of each op, in Triton's interpreter.

    TRITON_INTERPRET=1 MAMBA2_BACKEND=triton python -m benchmarks.gpu.record FILE TARGET [tiny]

The launches are those for TARGET (sm_90, …). `kernels` repeats each of them alone on the device.
"""

import importlib
import io
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import triton.language as tl
from triton.runtime.interpreter import GridExecutor

from benchmarks import pretend
from benchmarks.interpreter import prepare_interpreter
from mamba2.ops import causal_conv1d, linear_cross_entropy, ssd, ssd_step
from tests.ops import test_conv1d_triton, test_cross_entropy_triton, test_norm_triton, test_ssd_step
from tests.ops.test_ssd import documents, make_inputs

PARALLEL = 10**6  # more multiprocessors than there are programs: many segments


def differentiate(op: Callable, inputs: dict[str, torch.Tensor | None]) -> None:
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items() if t is not None}
    outputs = op(**{**inputs, **leaves})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


def ssd_call(
    n: int, multiprocessors: int = 1, l: int = 140, dtype: torch.dtype = torch.bfloat16, everything: bool = False
) -> None:
    optional = ("D", "z", "dt_bias", "initial_states") if everything else ("D", "dt_bias")
    inputs = make_inputs(1, l, 2, 32, 1, n, dtype=dtype, optional=optional, D_per_channel=everything)
    seq_idx = documents(1, l) if everything else None

    def op(**tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ssd(**tensors, chunk_size=64, dt_softplus=True, return_final_states=True, seq_idx=seq_idx)

    with pretend.multiprocessors(multiprocessors):
        differentiate(op, inputs)


def ssd_calls(tiny: bool) -> dict[str, Callable[[], None]]:
    if tiny:
        return {"spans": lambda: ssd_call(20, PARALLEL), "all": lambda: ssd_call(20, everything=True, l=20)}
    return {
        "n 142": lambda: ssd_call(142),
        "n 128, spans": lambda: ssd_call(128, PARALLEL),
        "n 142, documents, gate, states": lambda: ssd_call(142, everything=True),
        "n 142, spans, documents, gate, states": lambda: ssd_call(142, PARALLEL, everything=True),
        "n 143": lambda: ssd_call(143),
        "n 153": lambda: ssd_call(153),
        "n 64, float32": lambda: ssd_call(64, dtype=torch.float32, l=40),
    }


def encoded(value: Any) -> Any:
    """Arguments of a kernel as lists, tensors and numbers, which torch reads back without running anything."""
    if isinstance(value, tl.constexpr):
        return ["constexpr", value.value]
    if isinstance(value, tuple):
        kind = [type(value).__module__, type(value).__name__]
        return ["tuple", kind, [encoded(field) for field in value]]
    return value


def decoded(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if value[0] == "constexpr":
        return tl.constexpr(value[1])
    (module, name), fields = value[1], [decoded(field) for field in value[2]]
    return tuple(fields) if name == "tuple" else getattr(importlib.import_module(module), name)(*fields)


def tensors_of(args: tuple) -> list[torch.Tensor]:
    """In order, those inside tuples as well."""
    nested = [tensors_of(a) if isinstance(a, tuple) else [a] for a in args]
    return [leaf for leaves in nested for leaf in leaves if isinstance(leaf, torch.Tensor)]


CALLS: dict[str, Callable[[], None]] = {
    "convolution": lambda: differentiate(
        causal_conv1d, test_conv1d_triton.make_inputs(2, 37, 142, 4, torch.bfloat16, optional=("bias",))
    ),
    "norm of a sum": lambda: differentiate(
        test_norm_triton.add, test_norm_triton.make_add(2, 17, 142, dtype=torch.bfloat16)
    ),
    "gated norm": lambda: differentiate(
        test_norm_triton.gated(2), test_norm_triton.make_gated(2, 17, 96, dtype=torch.bfloat16)
    ),
    "loss": lambda: differentiate(
        lambda **t: linear_cross_entropy(**t, targets=test_cross_entropy_triton.make_targets(12, 257)),
        test_cross_entropy_triton.make_inputs(12, 32, 257, torch.bfloat16),
    ),
    "step": lambda: ssd_step(**test_ssd_step.make_inputs(2, 4, 32, 2, 142, torch.bfloat16, D=1, dt_bias=True)),
}


def main() -> None:
    path, target, *tiny = sys.argv[1:]
    prepare_interpreter()
    for module in [m for name, m in sys.modules.items() if name.startswith("mamba2.ops") and hasattr(m, "target_of")]:
        module.target_of = lambda device: target
    launches, call = [], GridExecutor.__call__

    def run(self, *args, **kwargs):
        before = io.BytesIO()
        torch.save((encoded(args), kwargs), before)  # keeps strides, and storage that tensors share
        call(self, *args, **kwargs)
        after = [tensor.detach().clone() for tensor in tensors_of(args)]
        launches.append(
            {
                "case": f"{self.fn.__name__}, {current}",
                "kernel": (self.fn.__module__, self.fn.__name__),
                "grid": tuple(self.grid),
                "before": torch.load(io.BytesIO(before.getvalue()), weights_only=True),
                "after": after,
            }
        )

    with mock.patch.object(GridExecutor, "__call__", run):
        for current, make in (ssd_calls(bool(tiny)) | CALLS).items():  # noqa: B007 (`run` names the cases by it)
            make()
    torch.save(launches, path)


if __name__ == "__main__":
    main()
