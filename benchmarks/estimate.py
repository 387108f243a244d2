"""Estimates a kernel's time from its machine code: `python -m benchmarks.kernel_report --time`.

No GPU is needed, and nothing is timed. The estimate of a launch, at its real shape, is the largest of

    bytes     of the launch's arguments / 0.9 of the bandwidth
    issue     instructions of all warps / (4 a cycle and multiprocessor, of which 0.7 are reached)
    matrix    operations / the matrix units' peak; of mma.sync on Hopper 0.62 of it
    special   exponentials and their like / 16 a cycle and multiprocessor
    shared    bytes that wgmma, loads and stores move in shared memory / 128 a cycle and multiprocessor
    chain     iterations in sequence x the latency of one x how often the device has to be filled

plus 2 us for the launch. Instructions are those of the machine code (nvdisasm), in loops times their trips. Trips are
counted, not guessed: of each launch a few programs run in the interpreter, at the real shape, and their source lines
are traced. A loop of the machine code belongs to the source loop that most of its lines are in. The latency of an
iteration is that of one warp alone: it issues in order, after the stalls that the assembler wrote into each
instruction, and waits for the barriers that loads, exponentials and products set, with the latencies below. Bytes are
those of the arguments, each once: what a launch reads again is taken to come from the second-level cache.

Each of mamba-ssm's kernels is taken with the best of the first four configurations that its autotuner would try.

Not modelled: bank conflicts, how well loads of several programs overlap, the second-level cache, and what two
programs on a multiprocessor take from each other.
"""

import ast
import contextlib
import functools
import hashlib
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

LAUNCH = 2.0  # us between the starts of two kernels
EFFICIENCY = 0.7  # of the issue slots


@dataclass(frozen=True)
class Device:
    multiprocessors: int
    clock: float  # GHz
    bandwidth: float  # bytes/s
    peak: float  # FLOP/s of dense bfloat16
    mma_sync: float  # the part of it that mma.sync reaches


DEVICES = {
    "sm_90": Device(132, 1.755, 3.35e12, 989e12, 0.62),  # H100 SXM
    "sm_80": Device(108, 1.41, 2.04e12, 312e12, 1.0),  # A100 SXM 80 GB
}

# Cycles from issue to result. Arithmetic is not listed: the assembler writes its latency into the stalls.
LATENCIES = {
    r"LDS|LDSM": 30,
    r"LDG(?!STS|DEP)|LDL": 400,
    r"MUFU|F2F|I2F|S2R": 25,
    r"HMMA": 33,
    r"HGMMA": 64,
    r"SHFL|R2UR|S2UR": 25,
    r"LDGSTS|LDGDEPBAR": 30,
}
BARRIER, OTHER = 30, 12


class Instruction(NamedTuple):
    op: str
    line: tuple[str, int]  # file, line
    stall: int
    sets: int  # barrier that its result sets, or 7
    waits: int  # mask of barriers


class Loop(NamedTuple):
    start: int
    end: int
    source: tuple[str, int, int]  # file, first and last line of the body


def disassemble(cubin: bytes) -> tuple[list[Instruction], list[tuple[int, int]]]:
    """Instructions in order, and (first, last) of each loop: a branch back is its last."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", "-g", "-hex", file.name], capture_output=True, text=True, check=True).stdout
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    branches, line, op = [], ("", 0), ""
    for raw in text.splitlines():
        if found := re.match(r"\s*//## File \"(.+?)\", line (\d+)", raw):
            line = (found[1], int(found[2]))
        elif found := re.match(r"(\.L_\w+):", raw.strip()):
            labels[found[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);\s+/\* 0x[0-9a-f]+ \*/", raw):
            op = re.sub(r"^@!?U?P\w+\s+", "", found[1].strip())
            if target := re.match(r"BRA\b.*`\((\.L_\w+)\)", op):
                branches.append((len(instructions), target[1]))
        elif op and (found := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/", raw)):
            word = int(found[1], 16)  # the upper half of 128 bits: the last 23 control how it is issued
            instructions.append(Instruction(op, line, word >> 41 & 15, word >> 46 & 7, word >> 52 & 63))
            op = ""
    loops = [(labels[target], at) for at, target in branches if labels.get(target, at + 1) < at]
    return instructions, loops


def latency(body: list[Instruction]) -> int:
    """Cycles of one iteration of one warp that runs alone, once it is under way."""
    ready = [0] * 6
    began, clock = 0, 0
    for _ in range(2):  # an iteration can wait for what the one before started
        began = clock
        for instruction in body:
            for barrier in range(6):
                if instruction.waits >> barrier & 1:
                    clock = max(clock, ready[barrier])
            if instruction.sets < 6:
                cycles = next((c for name, c in LATENCIES.items() if re.match(name, instruction.op)), OTHER)
                ready[instruction.sets] = clock + cycles
            clock += max(1, instruction.stall)
            if instruction.op.startswith(("BAR", "WARPGROUP.DEPBAR")):
                clock += BARRIER
    return clock - began


def source_loops(files: set[str]) -> list[tuple[str, int, int]]:
    """(file, first line of the body, last) of each `for` that is a loop of the kernel, not one unrolled."""
    found = []
    for file in files:
        if Path(file).exists():
            for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))):
                if isinstance(node, ast.For) and "static_range" not in ast.dump(node.iter):
                    found.append((file, node.body[0].lineno, max(getattr(n, "end_lineno", 0) or 0 for n in node.body)))
    return found


def match(instructions: list[Instruction], loops: list[tuple[int, int]]) -> list[Loop]:
    """Innermost loops of the machine code with the source loop that holds most of their lines; others are left out."""
    candidates = source_loops({i.line[0] for i in instructions})
    result = []
    for start, end in sorted(loops):
        if any(start <= other and last <= end and (other, last) != (start, end) for other, last in loops):
            continue  # it holds another loop
        lines = Counter(i.line for i in instructions[start : end + 1])
        inside = [
            (sum(count for (file, n), count in lines.items() if file == c[0] and c[1] <= n <= c[2]), c[1] - c[2], c)
            for c in candidates
        ]
        if inside and max(inside)[0] > 0:
            result.append(Loop(start, end, max(inside)[2]))
    return result


@contextlib.contextmanager
def few_programs(counted: list[dict]) -> Iterator[None]:
    """In the interpreter: of each launch PROGRAMS neighbours run, whose lines are counted, {"file:line": times}."""
    from triton.runtime import interpreter

    builder, plain = interpreter.interpreter_builder, interpreter.GridExecutor.__call__

    def run(self, *args, **kwargs):
        grid = (*(self.grid(kwargs) if callable(self.grid) else self.grid), 1, 1)[:3]
        count = min(PROGRAMS, math.prod(grid))
        hits: Counter = Counter()

        def trace(frame, event, _):
            if "/ops/" not in frame.f_code.co_filename:
                return None
            if event == "line":
                hits[f"{frame.f_code.co_filename}:{frame.f_lineno}"] += 1
            return trace

        self.grid = (count, 1, 1)
        places = [(i % grid[0], i // grid[0] % grid[1], i // grid[0] // grid[1]) for i in range(count)]
        set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
        with (
            mock.patch.object(builder, "set_grid_dim", lambda *_: set_dim(*grid)),
            mock.patch.object(builder, "set_grid_idx", lambda x, y, z: set_index(*places[x])),
            mock.patch.object(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None),  # it copies onto itself
        ):
            sys.settrace(trace)
            try:
                plain(self, *args, **kwargs)
            finally:
                sys.settrace(None)
        counted.append({"kernel": self.fn.__name__, "lines": {line: n / count for line, n in hits.items()}})

    with mock.patch.object(interpreter.GridExecutor, "__call__", run):
        yield


@contextlib.contextmanager
def noted(launches: list[tuple]) -> Iterator[None]:
    """Launches as (kernel, args, kwargs, grid), none of which runs."""
    from triton.runtime.jit import JITFunction

    def note(kernel, *args, grid, warmup, **kwargs):
        launches.append((kernel, args, kwargs, (*(grid(kwargs) if callable(grid) else grid), 1, 1)[:3]))

    with mock.patch.object(JITFunction, "run", note):
        yield


def call(
    who: str, shape: tuple[int, ...], form: str, target: str, watch: Callable, configuration: int = 0
) -> tuple[list, list]:
    """What `watch` recorded of a forward and a backward pass of `who`: "mamba2", or a configuration of "mamba-ssm"."""
    import torch

    from benchmarks.gpu.fast import make_tensors
    from mamba2.ops import ssd
    from mamba2.ops.ssd import op
    from tests.oracles import mamba_ssm_environment, mamba_ssm_scan

    count = DEVICES[target].multiprocessors
    # Imported before TRITON_INTERPRET is set below, so that its kernels are compiled, not interpreted.
    sys.modules.setdefault("selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
    with mamba_ssm_environment(count):
        configure(importlib.import_module("mamba_ssm.ops.triton.ssd_combined"), configuration)
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),  # lets CPU tensors through
        mock.patch.object(torch, "randn", lambda *size, **_: torch.zeros(size)),
        mock.patch.object(op, "multiprocessors", lambda _: count),
        mock.patch.object(op, "target_of", lambda _: target),
        mock.patch("tests.oracles._first_configuration"),
        mamba_ssm_environment(count),
    ):
        tensors = make_tensors(shape, torch.device("cpu"), form == "documents")
        function = ssd if who == "mamba2" else mamba_ssm_scan(count)
        forward: list = []
        backward: list = []
        with watch(forward):
            y = function(**tensors, chunk_size=256, dt_softplus=True)
        with watch(backward):
            torch.autograd.grad(y, [t for t in tensors.values() if t.requires_grad], torch.empty_like(y))
    return forward, backward


def configure(combined: types.ModuleType, number: int) -> None:
    """Leave each of mamba-ssm's autotuners one configuration, the last where it has fewer."""
    from triton.runtime.autotuner import Autotuner

    for kernel in vars(combined).values():
        # `_chunk_scan_fwd` and its like, functions of the modules that the kernels are in.
        for tuner in vars(sys.modules.get(getattr(kernel, "__module__", ""), types)).values():
            if isinstance(tuner, Autotuner):
                tuner.all_configs = getattr(tuner, "all_configs", tuner.configs)
                tuner.configs = [tuner.all_configs[min(number, len(tuner.all_configs) - 1)]]


def trips(who: str, shape: tuple[int, ...], form: str, target: str, configuration: int) -> list[list[dict]]:
    """`call` in the interpreter, which needs a process of its own: kernels are interpreted or compiled, never both."""
    code = "import json, sys; from benchmarks.estimate import call, few_programs; "
    code += f"print(json.dumps(call({who!r}, {shape!r}, {form!r}, {target!r}, few_programs, {configuration})))"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "MAMBA2_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def tensors_in(values: Any) -> list:
    import torch

    if isinstance(values, torch.Tensor):
        return [values]
    return [t for value in values for t in tensors_in(value)] if isinstance(values, (tuple, list)) else []


class Bounds(NamedTuple):
    """Microseconds of one launch."""

    kernel: str
    bytes: float
    issue: float
    matrix: float
    special: float
    shared: float
    chain: float

    @property
    def time(self) -> float:
        return max(self[1:]) + LAUNCH

    @property
    def binds(self) -> str:
        return max(zip(self[1:], self._fields[1:]))[1]


def estimate(kernel, args: tuple, kwargs: dict, grid: tuple, lines: dict[str, float], target: str) -> Bounds:
    """The bounds of one launch; `lines` says how often a program runs each line of the source."""
    import triton
    from triton.compiler.compiler import ASTSource, make_backend

    from benchmarks.compilation import TARGETS, _cuda_usage, specialize

    device, limits = DEVICES[target], TARGETS[target]
    backend = make_backend(limits.triton)
    bound, specialization, options = specialize(kernel, args, kwargs, target)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    # Triton's cache does not tell checkouts apart, and its entries name the source files of the first.
    checkout = hashlib.sha256(__file__.encode()).hexdigest()[:12]
    os.environ["TRITON_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"mamba2-estimate-{checkout}")
    compiled = triton.compile(source, target=limits.triton, options=options.__dict__)
    registers, _ = _cuda_usage(compiled.asm["cubin"])
    threads = 32 * options.num_warps
    resident = min(
        limits.registers // (-(-registers // 8) * 8 * threads),
        limits.shared_total // (compiled.metadata.shared + 1024),
        limits.threads // threads,
    )
    if resident == 0:  # one program needs more than a multiprocessor has
        return Bounds(kernel.fn.__name__, *[math.inf] * 6)
    instructions, loops = analysed(compiled.asm["cubin"])
    # Several copies of a source loop are alternative paths, of which a program takes one.
    chain, shares = 0.0, Counter(loop.source for loop in loops)
    ways = max(shares.values(), default=1)
    times = [0.0] * len(instructions)  # that a program runs each instruction
    for i, instruction in enumerate(instructions):
        file, line = instruction.line
        times[i] = min(1.0, lines.get(f"{file}:{line}", 0.0)) / ways
    for loop in loops:
        file, first, _ = loop.source
        count = lines.get(f"{file}:{first}", 0.0) / shares[loop.source]  # one copy for each path
        times[loop.start : loop.end + 1] = [count] * (loop.end + 1 - loop.start)
        chain += count * latency(instructions[loop.start : loop.end + 1])
    inside = {i for loop in loops for i in range(loop.start, loop.end + 1)}
    chain += latency([x for i, x in enumerate(instructions) if i not in inside and times[i] > 0]) / ways
    programs = math.prod(grid)
    warps = options.num_warps * programs

    def total(weigh: Callable[[str], float]) -> float:
        return warps * sum(n * weigh(i.op) for n, i in zip(times, instructions))

    cycles = device.multiprocessors * device.clock * 1e3  # of all multiprocessors in a microsecond
    seen = {(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in tensors_in((args, tuple(kwargs.values())))}
    return Bounds(
        kernel.fn.__name__,
        sum(seen.values()) / (0.9 * device.bandwidth) * 1e6,
        total(lambda _: 1.0) / (4 * EFFICIENCY * cycles),
        total(lambda op: operations(op, device)) / device.peak * 1e6,
        total(lambda op: 32.0 if op.startswith("MUFU") else 0.0) / (16 * cycles),
        total(shared_bytes) / (128 * cycles),
        max(1.0, programs / (resident * device.multiprocessors)) * chain / (device.clock * 1e3),
    )


@functools.cache
def analysed(cubin: bytes) -> tuple[list[Instruction], list[Loop]]:
    instructions, loops = disassemble(cubin)
    return instructions, match(instructions, loops)


def operations(op: str, device: Device) -> float:
    """FLOP of a warp's matrix instruction; for mma.sync, what wgmma would do in the same time."""
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", op):
        return 2.0 * math.prod(map(int, found.groups())) / 4
    if found := re.match(r"HMMA\.(\d{2})(\d)(\d{1,2})", op):
        return 2.0 * math.prod(map(int, found.groups())) / device.mma_sync
    return 0.0


def shared_bytes(op: str) -> float:
    """Bytes in shared memory that a warp's instruction moves; of wgmma the operand B, which four warps share."""
    if found := re.match(r"HGMMA\.\d+x(\d+)x(\d+)", op):
        return 2.0 * int(found[1]) * int(found[2]) / 4
    if found := re.match(r"LDSM\S*?\.(\d)$", op.split()[0]):
        return 128.0 * int(found[1])
    if re.match(r"LDS|STS|LDGSTS", op):
        width = re.search(r"\.(64|128)\b", op.split()[0])
        return 32.0 * (int(width[1]) // 8 if width else 4)
    return 512.0 if op.startswith("STSM") else 0.0


def bounds_of(who: str, shape: tuple[int, ...], form: str, target: str, configuration: int) -> list[list[Bounds]]:
    """Of each launch of the forward and of the backward pass."""
    launches = call(who, shape, form, target, noted, configuration)
    counted = trips(who, shape, form, target, configuration)
    return [
        [estimate(*launch, lines["lines"], target) for launch, lines in zip(noted_ones, of_lines, strict=True)]
        for noted_ones, of_lines in zip(launches, counted)
    ]


def report(shapes: list[tuple[int, ...]], target: str, path: Path | None) -> None:
    """Print the table; with `path` write it as JSON, too."""
    rows = []
    for shape, form in ((shape, form) for shape in shapes for form in ("plain", "documents")):
        sums: dict[tuple[str, str], float] = {}
        print(f"\n{shape}, {form}, {target}: microseconds, estimated\n{HEADER}", flush=True)
        for who, configurations in (("mamba2", 1), ("mamba-ssm", CONFIGURATIONS)):
            tried = [bounds_of(who, shape, form, target, i) for i in range(configurations)]
            for part, *found in zip(("forward", "backward"), *tried):
                for b in (min(of_one, key=lambda b: b.time) for of_one in zip(*found, strict=True)):
                    sums[who, part] = sums.get((who, part), 0.0) + b.time
                    rows.append({"shape": shape, "form": form, "who": who, "part": part, **b._asdict(), "time": b.time})
                    figures = " ".join(f"{value:8.1f}" for value in (*b[1:], b.time))
                    print(f"{who:9} {part:8} {b.kernel:32} {figures}  {b.binds}", flush=True)
        for part in ("forward", "backward"):
            ours, theirs = sums["mamba2", part], sums["mamba-ssm", part]
            print(f"{part}: {ours:.0f} and {theirs:.0f}, {ours / theirs:.2f} x mamba-ssm's", flush=True)
    if path is not None:
        path.write_text(json.dumps({"target": target, "about": "estimated, nothing was timed", "rows": rows}, indent=1))


CONFIGURATIONS = 4  # of each of mamba-ssm's autotuners, of which the best is taken for each launch
PROGRAMS = 4  # that run in the interpreter, of each launch
HEADER = f"{'':51} {'bytes':>8} {'issue':>8} {'matrix':>8} {'special':>8} {'shared':>8} {'chain':>8} {'estimate':>8}"
