"""What the kernels of ssd cost, without a GPU: traffic counted in the interpreter, resources read off compilations.

    python -m benchmarks.kernel_report

Two shapes, bfloat16, with D, dt_bias and softplus, all that the backward needs kept. DRAM bytes are the unique 32-byte
sectors that each launch reads plus those that it writes, summed over launches; the floor reads every input and writes
every output once. The rows of mamba-ssm are counted in the same run, its first autotuning configuration, without the
torch operations between its launches. Both libraries choose by the number of multiprocessors: 1 stands for a training
batch, which fills any device, 132 for this one sequence alone on an H100.
"""

import os
import subprocess
import sys
from unittest import mock

SHAPES = {"b1 l512 h24 p32 g8 n142": (512, 24, 32, 8, 142), "b1 l512 h16 p64 g1 n128": (512, 16, 64, 1, 128)}


def main() -> None:
    if "--compile" in sys.argv:
        print_resources()
    else:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["MAMBA2_BACKEND"] = "triton"
        print_traffic()
        # Kernels decorated under the interpreter cannot be compiled: that needs a process of its own.
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "benchmarks.kernel_report", "--compile"]
        sys.exit(subprocess.run(command, env=environment).returncode)


def make_arguments(l: int, h: int, p: int, g: int, n: int) -> dict:
    """One sequence in bfloat16, parameters in float32."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    arguments = {
        "x": normal(1, l, h, p).bfloat16(),
        "dt": normal(1, l, h).bfloat16(),
        "A": -torch.arange(1.0, h + 1),
        "B": normal(1, l, g, n).bfloat16(),
        "C": normal(1, l, g, n).bfloat16(),
        "D": torch.ones(h),
        "dt_bias": torch.full((h,), -4.0),
    }
    return {name: tensor.requires_grad_() for name, tensor in arguments.items()}


def floor(l: int, h: int, p: int, g: int, n: int) -> tuple[int, int]:
    """Bytes per token that forward and backward cannot avoid: x, dt, B, C in and y out; those, dout and gradients."""
    inputs = 2 * (h * p + h + 2 * g * n)
    return inputs + 2 * h * p, 2 * inputs + 2 * h * p


def print_traffic() -> None:
    import torch

    from benchmarks.interpreter import record, use_exact_bfloat16
    from mamba2.ops import ssd
    from mamba2.ops.ssd import triton_op
    from tests.oracles import mamba_ssm_environment, mamba_ssm_scan

    use_exact_bfloat16()
    print(f"{'per token':52} {'launches':>8} {'requested':>10} {'DRAM':>10} {'floor':>8} {'kFLOP':>8}")
    for title, shape in SHAPES.items():
        for count in (1, 132):
            for who in ("mamba2", "mamba-ssm"):
                function = ssd if who == "mamba2" else mamba_ssm_scan(count)
                arguments = make_arguments(*shape)
                with (
                    mamba_ssm_environment(count),
                    mock.patch.object(triton_op, "multiprocessors", lambda _, c=count: c),
                ):
                    with record() as forward:
                        y = function(**arguments, chunk_size=256, dt_softplus=True)
                    gradient = torch.ones_like(y)
                    with record() as backward:
                        y.backward(gradient)
                for part, launches, least in zip(("forward", "backward"), (forward, backward), floor(*shape)):
                    sums = [sum(getattr(launch, key) for launch in launches) for key in ("requested", "dram", "flops")]
                    requested, dram, flops = (value / shape[0] for value in sums)
                    row = f"{title}  {who:9} {count:3} SM  {part}"
                    print(
                        f"{row:52} {len(launches):8} {requested:10,.0f} {dram:10,.0f} {least:8,} {flops / 1e3:8,.0f}",
                        flush=True,
                    )


def print_resources() -> None:
    from benchmarks.compilation import TARGETS, captured, compile_launch
    from mamba2.ops import ssd

    os.environ["TRITON_INTERPRET"] = "1"  # lets CPU tensors through to launches that are only noted, never run
    print(
        f"\n{'kernel':46} {'target':8} {'warps':>5} {'registers':>9} {'spills':>7} {'shared':>8}  matrix instructions"
    )
    for title, shape in SHAPES.items():
        arguments = make_arguments(*shape)

        def step(arguments: dict = arguments) -> None:
            ssd(**arguments, chunk_size=256, dt_softplus=True).sum().backward()

        for kernel, args, kwargs in captured(step):
            for target in TARGETS:
                c = compile_launch(kernel, args, kwargs, target)
                row = f"{title} {c.kernel}"
                print(
                    f"{row:46} {target:8} {c.num_warps:5} {c.registers:9} {c.spills:7} {c.shared:8,}"
                    f"  {c.matrix_instructions or '-'}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
