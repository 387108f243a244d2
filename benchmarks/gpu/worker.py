"""The process of one section: runs its cases in order and prints each result as a line of JSON.

    python -m benchmarks.gpu.worker SECTION FIRST run|names|compile OF WORK OUTPUT [--rehearse]

`compile` takes every OF-th case of all sections from FIRST on, and starts no Triton kernel: each is compiled into
Triton's cache, where the sections find it.
"""

import contextlib
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

SECTIONS = ("kernels", "right", "fast", "model", "tuned", "second")
Case = Callable[[], dict[str, Any]]  # returns figures by name; raises Wrong if they are not right


class Wrong(Exception):
    """A result that is not right, with the figures that show it."""

    def __init__(self, values: dict[str, Any]):
        super().__init__(values)
        self.values = values


@dataclass(frozen=True)
class Bench:
    """Where the cases run and how they are timed."""

    work: Path  # of this run of the command, removed at its end
    output: Path
    rehearse: bool = False
    compiling: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")

    def milliseconds(self, function: Callable[[], object]) -> float:
        """Median of some runs, the second-level cache flushed before each."""
        from triton.testing import do_bench

        if self.compiling:
            function()
            return 0.0
        return do_bench(function, warmup=10, rep=60, return_mode="median")

    def kernel_milliseconds(self, function: Callable[[], object]) -> dict[str, float]:
        """Time on the device by kernel, of one run; the mean of five, by the profiler."""
        from torch.profiler import ProfilerActivity, profile

        if self.compiling:
            return {}
        runs = 1 if self.rehearse else 5
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU if self.rehearse else ProfilerActivity.CUDA]) as profiler:
            for _ in range(runs):
                function()
            torch.cuda.synchronize()
        return {event.key: event.self_device_time_total / runs / 1e3 for event in profiler.key_averages()}


@contextlib.contextmanager
def nothing_started(share: int, of: int) -> Iterator[None]:
    """Triton compiles what would be launched, and launches nothing. Of what autotuners try, one process in `of` takes
    its share: all processes together fill the cache."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        return launch(self, *args, grid=grid, warmup=True, **kwargs)

    def tune(self, *args, **kwargs):
        for config in self.configs[share::of]:
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(Autotuner, "run", tune):
        yield


def quick_autotuners() -> None:
    """Time each configuration for milliseconds only: mamba-ssm's autotuners try a hundred and more."""
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    Autotuner.do_bench = staticmethod(lambda call, quantiles: do_bench(call, warmup=2, rep=10, quantiles=quantiles))


def cases_of(section: str, bench: Bench) -> dict[str, Case]:
    return importlib.import_module(f"benchmarks.gpu.{section}").cases(bench)


def device_lost() -> bool:
    """Whether the device refuses all further work of this process, as it does after an illegal access."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def run_cases(cases: dict[str, Case], first: int, say: Callable[..., None]) -> None:
    for i, (name, case) in list(enumerate(cases.items()))[first:]:
        say(begin=i)
        print(f"--- {name}", file=sys.stderr)
        status, values = "ok", {}
        try:
            values = case()
        except Wrong as wrong:
            status, values = "wrong", wrong.values
        except Exception as error:  # any error is reported for this case, and the next case runs
            traceback.print_exc()
            status, values = "failed", {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        if not torch.cuda.is_available():
            say(status=status, values=values, lost=False)
            continue
        say(status=status, values=values, lost=status == "failed" and device_lost())
        torch.cuda.empty_cache()


def main() -> None:
    section, first, mode, of, work, output, *rest = sys.argv[1:]
    # What libraries print must not come between the lines that the other process reads.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def say(**event: Any) -> None:
        print(json.dumps(event, default=str), file=lines)

    bench = Bench(Path(work), Path(output), rehearse="--rehearse" in rest, compiling=mode == "compile")
    with contextlib.ExitStack() as stack:
        if bench.rehearse:
            from benchmarks.gpu.stand_in import pretend_gpu
            from benchmarks.interpreter import prepare_interpreter

            prepare_interpreter()
            stack.enter_context(pretend_gpu())
        else:
            quick_autotuners()
        if mode == "compile":
            stack.enter_context(nothing_started(int(first), int(of)))
            everything = [case for name in SECTIONS[1:-1] for case in cases_of(name, bench).values()]
            for case in everything[int(first) :: int(of)][: 1 if bench.rehearse else None]:
                try:
                    case()
                except Exception:  # the case reports it when its section runs
                    traceback.print_exc()
            return
        cases = cases_of(section, bench)
        say(cases=list(cases))
        if mode == "run":
            run_cases(cases, int(first), say)


if __name__ == "__main__":
    from benchmarks.gpu import worker  # the module that the sections import, not a second copy of it

    began = time.monotonic()
    worker.main()
    print(f"--- {' '.join(sys.argv[1:4])}: {time.monotonic() - began:.1f} s", file=sys.stderr)
