"""Compile for real targets what a call would launch, with no GPU present, and read the result.

`captured` runs a function with every kernel launch replaced by a note of its arguments; `compile_launch` compiles
such a launch for a target exactly as Triton would on that device, specialisation on strides and alignment included.
It needs real `JITFunction`s: a process that was started without TRITON_INTERPRET=1.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature


@dataclass(frozen=True)
class Target:
    triton: GPUTarget
    shared_limit: int  # bytes that one program may have
    matrix_instructions: tuple[str, ...]


# Shared memory: CUDA's "maximum per thread block" by compute capability; LDS of CDNA3.
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, ("mma.sync",)),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, ("wgmma.mma_async", "mma.sync")),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, ("tcgen05.mma", "mma.sync")),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * 1024, ("mma.sync",)),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, ("v_mfma",)),
}


@dataclass(frozen=True)
class Compiled:
    kernel: str
    target: str
    num_warps: int
    registers: int  # per thread; vector registers (accumulation registers included) on AMD
    spills: int  # bytes of stack and local memory, or spilled registers on AMD
    shared: int  # bytes
    matrix_instructions: dict[str, int]  # how many of each kind

    @property
    def fits(self) -> bool:
        return self.spills == 0 and self.shared <= TARGETS[self.target].shared_limit


def captured(function: Callable[[], object]) -> list[tuple[JITFunction, tuple, dict]]:
    """The launches that `function` makes, in order, none of which runs."""
    launches = []

    def note(kernel, *args, grid, warmup, **kwargs):
        launches.append((kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", note):
        function()
    return launches


def compile_launch(kernel: JITFunction, args: tuple, kwargs: dict, target: str) -> Compiled:
    """Compile one captured launch. Raises what Triton raises when the target cannot take it."""
    backend = make_backend(TARGETS[target].triton)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[target].triton, options=options.__dict__)
    if "cubin" in compiled.asm:
        registers, spills, text = _cuda_usage(compiled.asm["cubin"]), None, compiled.asm["ptx"]
        registers, spills = registers
    else:
        text = compiled.asm["amdgcn"]
        registers, spills = _amd_usage(text)
    counts = {name: len(re.findall(re.escape(name), text)) for name in TARGETS[target].matrix_instructions}
    matrix = {name: count for name, count in counts.items() if count}
    return Compiled(kernel.fn.__name__, target, options.num_warps, registers, spills, compiled.metadata.shared, matrix)


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of stack and local memory, as cuobjdump reports them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers per thread, and spilled registers plus bytes of scratch memory."""
    usage = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\n", assembly)}
    # Scalar registers that do not fit go to lanes of vector registers, which `vgpr_count` has, not to memory.
    spills = usage["vgpr_spill_count"] + usage["private_segment_fixed_size"]
    return usage["vgpr_count"], spills
