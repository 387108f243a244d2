"""Costs of a block and of each of its ops, without a GPU: traffic counted in the interpreter, resources compiled.

    python -m benchmarks.block_report

The block is everything but the products in_proj and out_proj, which every implementation has: residual add and norm,
convolution, ssd, gated norm. `benchmarks.kernel_report` has the details of ssd; resources here are of the other ops.

The shape is one mixer block of `configs/config.json` (d_model 256, d_inner 768, h24 p32 g8 n142, K 4) on one sequence
of 512 tokens, activations in bfloat16, residual stream and parameters in float32; x and z are slices of in_proj's
output, as in the model. DRAM bytes are the unique 32-byte sectors that each launch reads plus those that it writes,
summed over launches; the floor reads every input and writes every output once, parameters included. "Kept" are the
activations that the backward needs: here they are inputs of the op, and of the add norm the sum, which is the next
block's input; never a copy.

The rows of mamba-ssm are its own Triton kernels, counted in the same run. Its convolution is CUDA, which cannot be
counted here: the floor stands for it. Its memory-efficient path computes the convolution once more in the backward
pass, which its sum includes, and keeps in_proj's output, y and the stream. `torch` is what torch runs on data between
the launches (sums, casts, transposes): bytes of arguments and results, on top of the other columns. The lines below
each whole block set ours against mamba-ssm's without them and with them. `mamba2-lean` is a block that keeps the
results of its products and the stream alone and runs every forward kernel once more.

Both libraries choose by the number of multiprocessors: 1 stands for a training batch, which fills any device, 132 for
this one sequence alone on an H100. Loss and gradient of logits are counted on a few rows: they have no state.
"""

import dataclasses
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from unittest import mock

import torch

TOKENS, D_MODEL, D_INNER, GROUPS, D_STATE, HEADS, WIDTH = 512, 256, 768, 8, 142, 24, 4
SPLITS = (D_INNER, GROUPS * D_STATE, GROUPS * D_STATE)  # of the convolution's result: x, B, C
CONV = sum(SPLITS)
VOCABULARY, LOSS_TOKENS = 50280, 8
LEAN = "mamba2-lean"  # Mamba2Block.keep_products_only
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """One op on its inputs, to be run forward and backward."""

    name: str
    forward: Callable[[], tuple[torch.Tensor, ...]]
    inputs: tuple[torch.Tensor, ...]  # parameters included; each gets a gradient
    # What the backward has to read beside the gradients of the outputs, given the outputs.
    reread: Callable[[tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one pass, per token."""

    launches: int
    requested: float  # bytes
    dram: float
    floor: float
    torch: float = 0.0  # bytes of arguments and results of what torch runs between the launches, on top


def total(costs: list[Cost]) -> Cost:
    return Cost(*(sum(getattr(cost, key) for cost in costs) for key in Cost.__dataclass_fields__))


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def projected(start: int, width: int) -> torch.Tensor:
    """Columns of in_proj's output (1, l, 2 d_inner + 2 g n + h)."""
    whole = leaf(1, TOKENS, D_INNER + CONV + HEADS, dtype=torch.bfloat16)
    return whole.detach()[..., start : start + width].requires_grad_()


def conv_case() -> Case:
    from mamba2.ops import causal_conv1d

    inputs = projected(D_INNER, CONV), leaf(CONV, WIDTH), leaf(CONV)
    return Case("conv", lambda: causal_conv1d(*inputs, splits=SPLITS), inputs, lambda outputs: inputs)


def gated_norm_case(function: Callable | None = None) -> Case:
    from mamba2.ops import gated_rms_norm

    x, z, weight = inputs = leaf(1, TOKENS, D_INNER, dtype=torch.bfloat16), projected(0, D_INNER), leaf(D_INNER)

    def ours():
        return (gated_rms_norm(x, z, weight, EPS, GROUPS),)

    def theirs():
        options = {"z": z, "eps": EPS, "group_size": D_INNER // GROUPS, "norm_before_gate": False}
        return (function(x, weight, None, **options),)

    return Case("gated norm", ours if function is None else theirs, inputs, lambda outputs: inputs)


def add_norm_case(function: Callable | None = None) -> Case:
    from mamba2.ops import add_rms_norm

    x, residual, weight = inputs = (
        leaf(1, TOKENS, D_MODEL, dtype=torch.bfloat16),
        leaf(1, TOKENS, D_MODEL),
        leaf(D_MODEL),
    )

    def ours():
        return add_rms_norm(x, residual, weight, EPS)

    def theirs():
        return function(x, weight, None, residual=residual, prenorm=True, residual_in_fp32=True, eps=EPS)

    return Case("add norm", ours if function is None else theirs, inputs, lambda outputs: (outputs[1], weight))


def ssd_case(function: Callable | None = None) -> Case:
    from mamba2.ops import ssd

    x, B, C = leaf(1, TOKENS, CONV, dtype=torch.bfloat16).detach().split(SPLITS, dim=-1)
    inputs = {
        "x": x.unflatten(-1, (HEADS, -1)).requires_grad_(),
        "dt": projected(D_INNER + CONV, HEADS),
        "A": (-torch.arange(1.0, HEADS + 1)).requires_grad_(),
        "B": B.unflatten(-1, (GROUPS, -1)).requires_grad_(),
        "C": C.unflatten(-1, (GROUPS, -1)).requires_grad_(),
        "D": torch.ones(HEADS).requires_grad_(),
        "dt_bias": torch.full((HEADS,), -4.0).requires_grad_(),
    }
    scan = function or ssd
    forward = lambda: (scan(**inputs, chunk_size=256, dt_softplus=True),)  # noqa: E731
    return Case("ssd", forward, tuple(inputs.values()), lambda outputs: tuple(inputs.values()))


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(case: Case, multiprocessors: int) -> tuple[Cost, Cost, float]:
    """Forward, backward, and bytes of activations kept between the two, per token. Needs the interpreter."""
    from benchmarks.interpreter import record, torch_operations
    from tests.oracles import mamba_ssm_environment

    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not any(tensor is parameter for parameter in case.inputs if parameter.dim() < 3):
            kept[tensor.data_ptr()] = size([tensor])
        return tensor

    with ExitStack() as stack:
        stack.enter_context(mamba_ssm_environment(multiprocessors))
        for module in ("mamba2.ops.conv1d", "mamba2.ops.norm", "mamba2.ops.ssd.op"):
            replaced = mock.patch.object(importlib.import_module(module), "multiprocessors", lambda _: multiprocessors)
            stack.enter_context(replaced)
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with record() as forward, torch_operations() as forward_torch, hooks:
            outputs = case.forward()
        gradients = [torch.ones_like(output) for output in outputs]
        with record() as backward, torch_operations() as backward_torch:
            torch.autograd.grad(outputs, case.inputs, gradients)
    floors = size([*case.inputs, *outputs]), size([*case.reread(outputs), *outputs, *case.inputs])
    costs = [
        Cost(
            len(launches),
            sum(launch.requested for launch in launches) / TOKENS,
            sum(launch.dram for launch in launches) / TOKENS,
            floor / TOKENS,
            sum(others) / TOKENS,
        )
        for launches, floor, others in zip((forward, backward), floors, (forward_torch, backward_torch))
    ]
    return *costs, sum(kept.values()) / TOKENS


def mamba_ssm_norms() -> tuple[Callable, Callable]:
    """mamba-ssm's gated norm and its norm of the residual stream, in the interpreter."""
    from triton.runtime.autotuner import Autotuner

    from tests.oracles import mamba_ssm_environment, mamba_ssm_scan

    mamba_ssm_scan()  # imports the package without its CUDA extension
    with mamba_ssm_environment():
        gated, plain = (
            importlib.import_module(f"mamba_ssm.ops.triton.{name}") for name in ("layernorm_gated", "layer_norm")
        )
    for kernel in vars(plain).values():
        if isinstance(kernel, Autotuner):
            kernel.configs = kernel.configs[:1]  # without a GPU nothing can be timed
    return gated.rmsnorm_fn, plain.rms_norm_fn


def measure_softmax(dtype: torch.dtype = torch.bfloat16) -> Cost:
    """Loss and gradient of logits, per token, in one pass."""
    from benchmarks.interpreter import record
    from mamba2.ops.cross_entropy import triton_softmax

    logits = leaf(LOSS_TOKENS, VOCABULARY, dtype=dtype).detach()
    targets = torch.arange(LOSS_TOKENS)
    with record() as launches:
        losses, gradient = triton_softmax(logits, targets, -100, True)
    requested, dram = (sum(getattr(launch, key) for launch in launches) for key in ("requested", "dram"))
    floor = size([logits, gradient, targets, losses])
    return Cost(len(launches), *(value / LOSS_TOKENS for value in (requested, dram, floor)))


def resource_launches() -> Iterator[tuple[str, list]]:
    """Launches, captured and not run, at the shapes of the study's model and of mamba2-2.7b (d 2560, d_inner 5120)."""
    from benchmarks.compilation import captured
    from mamba2.ops import add_rms_norm, causal_conv1d, gated_rms_norm
    from mamba2.ops.cross_entropy import triton_softmax

    def both(function: Callable, *inputs: torch.Tensor) -> list:
        def step() -> None:
            outputs = function(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])

        return captured(step)

    half = torch.bfloat16
    conv = projected(D_INNER, CONV), leaf(CONV, WIDTH), leaf(CONV)
    yield f"conv d{CONV} K{WIDTH}", both(causal_conv1d, *conv)
    yield f"conv d{CONV} K{WIDTH} x, B, C", both(lambda *t: causal_conv1d(*t, splits=SPLITS), *conv)
    documents, window = torch.zeros(1, TOKENS, dtype=torch.int32), leaf(1, WIDTH - 1, CONV, dtype=half)

    def documents_and_windows(x, weight, bias, window):
        ys, final = causal_conv1d(x, weight, bias, documents, window, return_final_state=True, splits=SPLITS)
        return *ys, final

    yield (
        f"conv d{CONV} K{WIDTH} x, B, C, documents, windows",
        both(documents_and_windows, *conv, window),
    )
    for d in (D_MODEL, 2560):
        tensors = leaf(1, TOKENS, d, dtype=half), leaf(1, TOKENS, d), leaf(d)
        yield f"add norm d{d}", both(lambda *t: add_rms_norm(*t, EPS), *tensors)
    for d, groups in ((D_INNER, GROUPS), (5120, 1)):
        x, weight = leaf(1, TOKENS, d, dtype=half), leaf(d)
        z = projected(0, d) if d == D_INNER else leaf(1, TOKENS, d, dtype=half)
        title = f"gated norm d{d} g{groups}"
        yield title, both(lambda *t, g=groups: gated_rms_norm(*t, EPS, g), x, z, weight)
    logits, targets = torch.zeros(LOSS_TOKENS, VOCABULARY, dtype=half), torch.zeros(LOSS_TOKENS, dtype=torch.int64)
    yield f"softmax v{VOCABULARY}", captured(lambda: triton_softmax(logits, targets, -100, True))


def resources() -> Iterator[tuple[str, list]]:
    """Title, and the `Compiled` of each target, for every kernel. Needs a process without TRITON_INTERPRET=1."""
    from benchmarks.compilation import TARGETS, compile_launch

    importlib.import_module("mamba2.ops")  # before the next line, so that kernels are compiled, not interpreted
    # Lets CPU tensors through to launches that are only noted, never run.
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1", MAMBA2_BACKEND="triton"):
        everything = list(resource_launches())
    summed = False
    for title, launches in everything:
        for kernel, args, kwargs in launches:
            if kernel.fn.__name__ == "_sum_rows_kernel":
                if summed:
                    continue  # the same for all
                summed = True
            yield title, [compile_launch(kernel, args, kwargs, target) for target in TARGETS]


def print_traffic() -> None:
    from benchmarks.interpreter import prepare_interpreter
    from tests.oracles import mamba_ssm_scan

    prepare_interpreter()
    gated, plain = mamba_ssm_norms()
    columns = f"{'launches':>8} {'requested':>10} {'DRAM':>9} {'floor':>9} {'torch':>7} {'kept':>7}"
    print(f"{'bytes per token':44} {columns}")

    def row(title: str, cost: Cost, kept: str = "") -> None:
        numbers = f"{cost.launches:8} {cost.requested:10,.0f} {cost.dram:9,.0f} {cost.floor:9,.0f} {cost.torch:7,.0f}"
        numbers += f" {kept:>7}"
        print(f"{title:44} {numbers}", flush=True)

    for count in (1, 132):
        block = {who: {"forward": [], "backward": []} for who in ("mamba2", LEAN, "mamba-ssm")}
        kept_by = dict.fromkeys(block, 0.0)
        for who, case in (
            ("mamba2", add_norm_case()),
            ("mamba-ssm", add_norm_case(plain)),
            ("mamba2", conv_case()),
            ("mamba2", ssd_case()),
            ("mamba-ssm", ssd_case(mamba_ssm_scan(count))),
            ("mamba2", gated_norm_case()),
            ("mamba-ssm", gated_norm_case(gated)),
        ):
            forward, backward, kept = measure(case, count)
            for part, cost in (("forward", forward), ("backward", backward)):
                row(f"{case.name:10}  {who:9} {count:3} SM  {part}", cost, f"{kept:,.0f}" if part == "forward" else "")
                block[who][part].append(cost)
            kept_by[who] += kept
            if case.name == "conv":
                at_floor = [Cost(1, cost.floor, cost.floor, cost.floor) for cost in (forward, backward)]
                block["mamba-ssm"]["forward"].append(at_floor[0])
                block["mamba-ssm"]["backward"] += [at_floor[1], dataclasses.replace(at_floor[0], floor=0.0)]
            if who == "mamba2":
                block[LEAN]["forward"].append(forward)
                block[LEAN]["backward"] += [backward, dataclasses.replace(forward, floor=0.0)]
        kept_by[LEAN] = 2 * (D_INNER + CONV + HEADS) + 2 * D_MODEL + 4 * D_MODEL
        # in_proj's output, y and the stream; in_proj's input is the product's own.
        kept_by["mamba-ssm"] = 2 * (2 * D_INNER + CONV + HEADS) + 4 * D_MODEL
        totals = {}
        for who, parts in block.items():
            for part, costs in parts.items():
                kept = f"{kept_by[who]:,.0f}" if part == "forward" else ""
                row(f"whole block {who:9} {count:3} SM  {part}", total(costs), kept)
            totals[who] = total([cost for costs in parts.values() for cost in costs])
        ours, theirs = totals["mamba2"], totals["mamba-ssm"]
        whole = f"whole block, {count} SM, forward and backward: mamba2 {ours.dram + ours.torch:,.0f} bytes per token,"
        print(whole, f"{(ours.dram + ours.torch) / ours.floor:.2f} of the floor")
        for what, bytes_ in (("kernels", theirs.dram), ("kernels and torch operations", theirs.dram + theirs.torch)):
            print(whole, f"{(ours.dram + ours.torch) / bytes_:.3f} of mamba-ssm's {what} ({bytes_:,.0f})", flush=True)
    row(f"softmax     mamba2     v {VOCABULARY}  both", measure_softmax())


def print_resources() -> bool:
    """Print the table. Returns whether every kernel fits every target without spilling."""
    from benchmarks.compilation import TARGETS

    fits = True
    titles = "".join(f" {target:>16}" for target in TARGETS)
    print(f"\n{'registers (bytes spilled, shared)':52} warps{titles}")
    for title, compiled in resources():
        cells = "".join(f" {f'{c.registers} ({c.spills}, {c.shared:,})':>16}" for c in compiled)
        kernel = compiled[0].kernel.removeprefix("_").removesuffix("_kernel")
        print(f"{title} {kernel}".ljust(52), f"{compiled[0].num_warps:5}{cells}", flush=True)
        fits = fits and all(c.fits for c in compiled)
    return fits


def main() -> None:
    os.environ["MAMBA2_BACKEND"] = "triton"
    if "--compile" in sys.argv:
        sys.exit(0 if print_resources() else "not every kernel fits every target without spilling")
    os.environ["TRITON_INTERPRET"] = "1"
    print_traffic()
    # Kernels decorated under the interpreter cannot be compiled: that needs a process of its own.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.block_report", "--compile"]
    sys.exit(subprocess.run(command, env=environment).returncode)


if __name__ == "__main__":
    main()
