"""Compile the kernels that a call would launch, for real targets and without a GPU, and read their resources.

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
    shared_total: int  # bytes of one multiprocessor
    threads: int  # that one multiprocessor runs at once
    registers: int  # of 32 bits, of one multiprocessor
    matrix_instructions: tuple[str, ...]


# By compute capability, CUDA's programming guide, "technical specifications"; CDNA3's instruction set reference for a
# compute unit (four SIMDs of 512 vector registers by 64 lanes, eight waves each).
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, 164 * 1024, 2048, 65536, ("mma.sync",)),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, 228 * 1024, 2048, 65536, ("wgmma.mma_async", "mma.sync")),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, 228 * 1024, 2048, 65536, ("tcgen05.mma", "mma.sync")),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * 1024, 100 * 1024, 1536, 65536, ("mma.sync",)),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, 64 * 1024, 2048, 131072, ("v_mfma",)),
}


# Bytes per thread that a kernel may spill. At 255 registers the assembler leaves a handful in memory, most of them
# outside the loop; which ones changes with every line. In loops on sm_90 and sm_80 they are 0 to 5 of about 1 000
# instructions, 24 of 1 323 at the most.
SPILLS = 128


@dataclass(frozen=True)
class Compiled:
    kernel: str
    target: str
    num_warps: int
    registers: int  # per thread; vector registers (accumulation registers included) on AMD
    spills: int  # bytes of stack and local memory, or spilled registers on AMD
    shared: int  # bytes
    matrix_instructions: dict[str, int]  # how many of each kind
    dots: bool  # whether the kernel has any tl.dot
    transposed: int  # products on Hopper whose first operand is another's result, transposed, in registers

    @property
    def programs(self) -> int:
        """How many one multiprocessor holds at once, by registers (granted in eights), shared memory and threads."""
        target = TARGETS[self.target]
        threads = self.num_warps * target.triton.warp_size
        by_registers = target.registers // (-(-self.registers // 8) * 8 * threads)
        by_shared = target.shared_total // (self.shared + (1024 if target.triton.backend == "cuda" else 1))
        return min(by_registers, by_shared, target.threads // threads)

    @property
    def fits(self) -> bool:
        """Whether the target can run it, and Triton before 3.7.1 compiles it correctly: on Hopper it multiplies wrongly
        when the first operand is a transposed result (triton-lang/triton#6124, fla-org/flash-linear-attention#640).
        """
        return self.spills <= SPILLS and self.shared <= TARGETS[self.target].shared_limit and not self.transposed


def captured(function: Callable[[], object]) -> list[tuple[JITFunction, tuple, dict]]:
    """The launches that `function` makes, in order, none of which runs."""
    launches = []

    def note(kernel, *args, grid, warmup, **kwargs):
        launches.append((kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", note):
        function()
    return launches


def specialize(kernel: JITFunction, args: tuple, kwargs: dict, target: str) -> tuple[dict, list, dict]:
    """Arguments by name, what of each is compiled in (type, alignment, constants), and options, as Triton sees them:
    two launches share a compiled kernel when the last two are equal."""
    binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(TARGETS[target].triton))
    return binder(*args, **kwargs)


def compile_launch(kernel: JITFunction, args: tuple, kwargs: dict, target: str) -> Compiled:
    """Compile one captured launch. Raises what Triton raises when the target cannot take it."""
    backend = make_backend(TARGETS[target].triton)
    bound, specialization, options = specialize(kernel, args, kwargs, target)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[target].triton, options=options.__dict__)
    if "cubin" in compiled.asm:
        registers, spills = _cuda_usage(compiled.asm["cubin"])
        text = compiled.asm["ptx"]
    else:
        text = compiled.asm["amdgcn"]
        registers, spills = _amd_usage(text)
    counts = {name: len(re.findall(re.escape(name), text)) for name in TARGETS[target].matrix_instructions}
    matrix = {name: count for name, count in counts.items() if count}
    return Compiled(
        kernel.fn.__name__,
        target,
        options.num_warps,
        registers,
        spills,
        compiled.metadata.shared,
        matrix,
        "tt.dot" in compiled.asm["ttir"],
        len(re.findall(r"warp_group_dot .*: tensor<\S+, #linear", compiled.asm["ttgir"])),
    )


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
