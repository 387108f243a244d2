"""Costs of ssd's kernels, without a GPU: traffic counted in the interpreter, resources read from compilations.

    python -m benchmarks.kernel_report                        both tables, then `benchmarks.block_report`: some minutes
    python -m benchmarks.kernel_report --traffic [SHAPE …]    the first
    python -m benchmarks.kernel_report --resources [SHAPE …]  the second; exit code 1 if a kernel spills (more than
                                                              128 bytes of a thread's registers), asks for more
                                                              shared memory than the device has, multiplies without
                                                              matrix instructions, or in a way that Triton before
                                                              3.7.1 compiles wrongly on Hopper
    python -m benchmarks.kernel_report --json FILE            what each launch moves and multiplies per token, for
                                                              `benchmarks.gpu` to put beside what it measures

Two shapes, `study` and `second`, bfloat16, with D, dt_bias and softplus, all that the backward needs kept. DRAM bytes
are the unique 32-byte sectors that each launch reads plus those that it writes, summed over launches; the floor reads
every input and writes every output once. The rows of mamba-ssm are counted in the same run, its first autotuning
configuration. Both libraries choose by the number of multiprocessors: 1 stands for a training batch, which fills any
device, 132 for this one sequence alone on an H100. `torch` is what torch runs on data between the launches (sums,
casts, transposes): the number of operations, and the bytes of their arguments and results, which come on top of the
other columns. Ours run none; `tests/ops/test_ssd_triton.py` looks inside the two custom operations.

The rows "step" are one token of decoding, `ssd_step` beside mamba-ssm's `selective_state_update`: batch 8, activations
in bfloat16, the state in float32, read and written. They are per sequence.

The estimates divide bytes by bandwidth and operations by arithmetic peak and take the larger: a bound, not a timing.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

if TYPE_CHECKING:
    from benchmarks.compilation import Compiled

SHAPES = {"study": (512, 24, 32, 8, 142), "second": (512, 16, 64, 1, 128)}  # l, h, p, g, n

# Dense bfloat16 peak (FLOP/s) and memory bandwidth (bytes/s) by the makers' data sheets.
DEVICES = {
    "A100 SXM 80 GB": (312e12, 2.04e12),
    "H100 SXM": (989e12, 3.35e12),
    "B200": (2250e12, 8.0e12),
    "RTX 5090": (209e12, 1.79e12),
    "MI300X": (1307e12, 5.3e12),
}

# How a call can differ in what its kernels do: whole sequences; packed documents with states carried in and out; either
# cut into segments.
FORMS = {
    "plain": {},
    "documents": {"seq_idx": True, "states": True},
    "segments": {"multiprocessors": 40},
    "both": {"seq_idx": True, "states": True, "multiprocessors": 40},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Traffic and resources of the SSD kernels, counted without a GPU.")
    parser.add_argument("--traffic", nargs="*", choices=SHAPES, metavar="SHAPE", help="only traffic, of these shapes")
    parser.add_argument("--resources", nargs="*", choices=SHAPES, metavar="SHAPE", help="only resources")
    parser.add_argument(
        "--json", metavar="FILE", help="write what was counted for each launch at benchmarks.gpu's shapes"
    )
    parser.add_argument("--time", nargs="*", type=int, metavar="SHAPE", help="only times, estimated; 1 to 6, or all")
    parser.add_argument("--target", choices=("sm_90", "sm_80"), default="sm_90", help="of --time [sm_90]")
    arguments = parser.parse_args()
    os.environ["MAMBA2_BACKEND"] = "triton"
    if arguments.time is not None:
        from benchmarks.estimate import report
        from benchmarks.gpu.fast import SHAPES as MEASURED

        chosen = arguments.time or range(1, len(MEASURED) + 1)
        report([MEASURED[i - 1] for i in chosen], arguments.target, arguments.json and Path(arguments.json))
        return
    if arguments.resources is not None:
        sys.exit(0 if print_resources(arguments.resources or list(SHAPES)) else 1)
    os.environ["TRITON_INTERPRET"] = "1"
    if arguments.json:
        write_counts(Path(arguments.json))
        return
    print_traffic(arguments.traffic or list(SHAPES))
    if arguments.traffic is None:
        print(flush=True)
        # Kernels decorated under the interpreter cannot be compiled: that needs a process of its own.
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        reports = (["benchmarks.kernel_report", "--resources"], ["benchmarks.block_report"])
        sys.exit(max(subprocess.run([sys.executable, "-m", *report], env=environment).returncode for report in reports))


def make_arguments(l: int, h: int, p: int, g: int, n: int, seq_idx: bool = False, states: bool = False) -> dict:
    """One sequence in bfloat16, as the convolution leaves it in three pieces; parameters in float32."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    x, B, C = normal(1, l, h * p), normal(1, l, g * n), normal(1, l, g * n)
    arguments = {
        "x": x.unflatten(-1, (h, p)),
        "dt": normal(1, l, h),
        "A": -torch.arange(1.0, h + 1),
        "B": B.unflatten(-1, (g, n)),
        "C": C.unflatten(-1, (g, n)),
        "D": torch.ones(h),
        "dt_bias": torch.full((h,), -4.0),
    }
    if states:
        arguments["initial_states"] = torch.zeros(1, h, p, n)
    arguments = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
    if seq_idx:
        arguments["seq_idx"] = torch.arange(l).view(1, l) // 100
    return arguments


def floor(l: int, h: int, p: int, g: int, n: int) -> tuple[int, int]:
    """Bytes per token that forward and backward cannot avoid: x, dt, B, C in and y out; those, dout and gradients."""
    inputs = 2 * (h * p + h + 2 * g * n)
    return inputs + 2 * h * p, 2 * inputs + 2 * h * p


def print_traffic(shapes: list[str]) -> None:
    import torch

    from benchmarks.interpreter import prepare_interpreter, record, torch_operations
    from benchmarks.pretend import multiprocessors
    from mamba2.ops import ssd
    from tests.oracles import mamba_ssm_environment, mamba_ssm_scan

    prepare_interpreter()
    estimates = []
    columns = f"{'launches':>8} {'torch':>5} {'bytes':>7} {'requested':>10} {'DRAM':>8} {'floor':>7} {'kFLOP':>7}"
    print(f"{'per token':44} {columns}")
    for title in shapes:
        shape = SHAPES[title]
        for count in (1, 132):
            for who in ("mamba2", "mamba-ssm"):
                function = ssd if who == "mamba2" else mamba_ssm_scan(count)
                arguments = make_arguments(*shape)
                with mamba_ssm_environment(count), multiprocessors(count):
                    with record() as forward, torch_operations() as forward_torch:
                        y = function(**arguments, chunk_size=256, dt_softplus=True)
                    gradient = torch.ones_like(y)
                    with record() as backward, torch_operations() as backward_torch:
                        y.backward(gradient)
                for part, launches, others, least in zip(
                    ("forward", "backward"), (forward, backward), (forward_torch, backward_torch), floor(*shape)
                ):
                    sums = [sum(getattr(launch, key) for launch in launches) for key in ("requested", "dram", "flops")]
                    requested, dram, flops = (value / shape[0] for value in sums)
                    row = f"{title:7} {who:9} {count:3} SM  {part}"
                    torch_bytes = sum(others) / shape[0]
                    print(
                        f"{row:44} {len(launches):8} {len(others):5} {torch_bytes:7,.0f} {requested:10,.0f} "
                        f"{dram:8,.0f} {least:7,} "
                        f"{flops / 1e3:7,.0f}",
                        flush=True,
                    )
                    bounds = [max(dram / bandwidth, flops / peak) * 1e9 for peak, bandwidth in DEVICES.values()]
                    estimates.append((row, bounds))
    print_step_traffic(shapes)
    print("\nestimated ns per token (a bound from bandwidth and arithmetic peak; nothing was timed)")
    print(f"{'':44} " + " ".join(f"{name:>15}" for name in DEVICES))
    for row, bounds in estimates:
        print(f"{row:44} " + " ".join(f"{bound:15.1f}" for bound in bounds))


def write_counts(path: Path) -> None:
    """DRAM bytes and operations per token of every launch, forward and backward, in a sequence of 512 tokens.

    With one group, 8 and 16 heads are counted and the rest extrapolated: each further head adds the same.
    """
    from benchmarks.gpu.fast import SHAPES as MEASURED
    from benchmarks.gpu.right import FORMS as WALKS
    from benchmarks.interpreter import prepare_interpreter

    prepare_interpreter()
    rows = []
    for h, p, g, n in dict.fromkeys(shape[2:] for shape in MEASURED):
        for form in ("plain", "documents"):
            for walk in WALKS:
                few, many = (count_launches((heads, p, g, n), form, walk) for heads in ((8, 16) if g == 1 else (h, h)))
                for (kernel, *at_few), (_, *at_many) in zip(few, many, strict=True):
                    dram, flops = (a + (b - a) * (h - 8) / 8 for a, b in zip(at_few, at_many))
                    row = {"shape": (h, p, g, n), "form": form, "walk": walk, "kernel": kernel}
                    rows.append({**row, "dram": round(dram, 1), "flops": round(flops)})
                print(f"{(h, p, g, n)}, {form}, {walk}: {len(few)} launches", flush=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    about = "per token, bfloat16; printed by python -m benchmarks.kernel_report --json"
    path.write_text(f'{{"about": "{about}", "launches": [\n{lines}\n]}}\n', encoding="utf-8")


@functools.cache
def count_launches(shape: tuple[int, int, int, int], form: str, walk: str) -> list[tuple[str, float, float]]:
    """(kernel, DRAM bytes, operations) per token of each launch, in order."""
    import torch

    from benchmarks.gpu.right import FORMS as WALKS
    from benchmarks.interpreter import record
    from benchmarks.pretend import multiprocessors
    from mamba2.ops import ssd

    l, documents = 512, form == "documents"
    arguments = make_arguments(l, *shape, seq_idx=documents)
    with multiprocessors(WALKS[walk]), record() as launches:
        y = ssd(**arguments, chunk_size=256, dt_softplus=True, return_final_states=documents)
        torch.autograd.backward(y[0] if documents else y, torch.ones_like(arguments["x"]))
    return [(launch.name, launch.dram / l, launch.flops / l) for launch in launches]


STEP_BATCH = 8


def make_step_arguments(l: int, h: int, p: int, g: int, n: int) -> dict:
    """One token of STEP_BATCH sequences, x, B and C as the convolution leaves them."""
    sequence = make_arguments(STEP_BATCH, h, p, g, n)
    arguments = {name: t.detach() for name, t in sequence.items()}
    for name in ("x", "dt", "B", "C"):
        arguments[name] = arguments[name][0]
    return {"state": arguments["x"].new_zeros(STEP_BATCH, h, p, n, dtype=sequence["A"].dtype), **arguments}


def print_step_traffic(shapes: list[str]) -> None:
    from benchmarks.interpreter import record
    from mamba2.ops import ssd_step
    from tests.oracles import mamba_ssm_state_update

    for title in shapes:
        arguments = make_step_arguments(*SHAPES[title])
        b, h, p, n = arguments["state"].shape
        x = arguments["x"]
        read = sum(t.numel() * t.element_size() for t in arguments.values())
        least = (read + arguments["state"].nbytes + x.numel() * x.element_size()) / b
        expanded = {
            **arguments,
            "A": arguments["A"][:, None, None].expand(h, p, n),
            "dt": arguments["dt"][..., None].expand(b, h, p),
            "dt_bias": arguments["dt_bias"][:, None].expand(h, p),
            "D": arguments["D"][:, None].expand(h, p),
        }
        for who, function, inputs in (
            ("mamba2", ssd_step, arguments),
            ("mamba-ssm", mamba_ssm_state_update(), expanded),
        ):
            with record() as launches:
                function(**inputs, dt_softplus=True)
            requested, dram = (sum(getattr(launch, key) for launch in launches) / b for key in ("requested", "dram"))
            print(
                f"{f'{title:7} {who:9}         step':44} {len(launches):8} {0:5} {0:7} {requested:10,.0f} {dram:8,.0f} "
                f"{least:7,.0f} {0:7}   {dram / least:.2f} x floor",
                flush=True,
            )


def step_resources(shapes: list[str]) -> "Iterator[tuple[str, Compiled]]":
    """The kernel of one token compiled for every target, plain and with z."""
    from benchmarks.compilation import TARGETS, captured, compile_launch
    from mamba2.ops import ssd_step

    os.environ["MAMBA2_BACKEND"], os.environ["TRITON_INTERPRET"] = "triton", "1"
    for title in shapes:
        arguments = make_step_arguments(*SHAPES[title])
        for form, more in (("plain", {}), ("gate", {"z": arguments["x"]})):
            for kernel, args, kwargs in captured(lambda a=arguments, m=more: ssd_step(**a, **m, dt_softplus=True)):
                for target in TARGETS:
                    c = compile_launch(kernel, args, kwargs, target)
                    yield f"{title:6} {form:9} {kernel.fn.__name__:17} {target:7}", c


def print_resources(shapes: list[str]) -> bool:
    """Print the table. Returns whether every kernel fits every target."""
    import torch
    from triton.runtime.errors import PTXASError

    from benchmarks.compilation import TARGETS, captured, compile_launch, specialize
    from benchmarks.pretend import multiprocessors
    from mamba2.ops import ssd
    from mamba2.ops.ssd import op

    os.environ["TRITON_INTERPRET"] = "1"  # lets CPU tensors through to launches that are only noted, never run
    good = True
    print(f"{'kernel':34} {'target':7} {'warps':>5} {'registers':>9} {'spills':>6} {'shared':>7} {'programs':>8}  dots")
    for title in shapes:
        seen = set()
        for form, settings in FORMS.items():
            settings = dict(settings)
            count = settings.pop("multiprocessors", 1)
            arguments = make_arguments(*SHAPES[title], **settings)

            def step(arguments: dict = arguments) -> None:
                results = ssd(**arguments, chunk_size=256, dt_softplus=True, return_final_states=True)
                used = results if "initial_states" in arguments else results[:1]
                torch.autograd.backward(used, [torch.empty_like(t) for t in used])

            for target in TARGETS:
                with multiprocessors(count), mock.patch.object(op, "target_of", lambda _, t=target: t):
                    launches = captured(step)
                for kernel, args, kwargs in launches:
                    key = (kernel.fn.__name__, target, str(specialize(kernel, args, kwargs, target)[1:]))
                    if key in seen:
                        continue
                    seen.add(key)
                    row = f"{title:6} {form:9} {kernel.fn.__name__:17} {target:7}"
                    try:
                        c = compile_launch(kernel, args, kwargs, target)
                    except PTXASError:
                        good = False
                        print(f"{row} does not compile: too many registers for the assembler", flush=True)
                        continue
                    fits = c.fits and (bool(c.matrix_instructions) or not c.dots)
                    good &= fits
                    matrix = ", ".join(f"{count} {name}" for name, count in c.matrix_instructions.items())
                    print(
                        f"{row} {c.num_warps:5} {c.registers:9} {c.spills:6} {c.shared:7,} {c.programs:8}"
                        f"  {matrix or '-'}{'' if fits else '   DOES NOT FIT'}",
                        flush=True,
                    )
    for row, c in step_resources(shapes):
        good &= c.fits
        print(f"{row} {c.num_warps:5} {c.registers:9} {c.spills:6} {c.shared:7,} {c.programs:8}  -", flush=True)
    return good


if __name__ == "__main__":
    main()
