"""Check and measure everything on this GPU in one command: do the kernels run, are they right, how fast are they?

    python -m benchmarks.gpu                          all sections, in order of value: at most 8 minutes on an H100
    python -m benchmarks.gpu --only fast model        some of them
    python -m benchmarks.gpu --second                 afterwards, at most 3 minutes: what failed once more under
                                                      compute-sanitizer, Nsight Compute on scan and gradient
    python -m benchmarks.gpu --rehearse               the same sections on a processor: tiny shapes in Triton's
                                                      interpreter, stand-ins for clocks and device queries

Sections (`--list` names their cases):

    compile    every kernel that the others start, on all cores at once; nothing is measured
    kernels    the device's peak speeds; each kernel alone, against the interpreter's result for the same arguments
    right      every op against float64 and mamba-ssm, repeated runs, offsets past 2**31, compute-sanitizer
    fast       ssd: both of our forms, mamba-ssm, flash-linear-attention; each kernel beside its estimate
    model      training steps, memory, share of the step that waits for the host, decoding, resuming to the bit
    tuned      what MAMBA2_AUTOTUNE=1 chooses for ssd, and what that gains

Each section runs in a process of its own, with a time limit of its own; time that a section leaves goes to the next.
A case that fails, hangs or ends its process does not stop the others. Every result is printed as it comes and written
to --output at once: gpu.md to read, gpu.json with all figures, gpu.log with the processes' other output.
"""

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.worker import SECTIONS
from mamba2.files import write_text
from mamba2.training.hardware import versions

LIMITS = {"compile": 80, "kernels": 60, "right": 90, "fast": 110, "model": 110, "tuned": 30}  # seconds; 480 in all
SECOND = 180
CASE = 60  # seconds after which a case counts as hanging


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), metavar="DIR", help="[runs/gpu]")
    parser.add_argument("--only", nargs="+", choices=LIMITS, metavar="SECTION", help=", ".join(LIMITS))
    parser.add_argument("--seconds", type=float, help="for all sections together, shared out as the limits are")
    parser.add_argument("--second", action="store_true", help="look closer at what an earlier run left in --output")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU; figures mean nothing")
    parser.add_argument("--list", action="store_true", help="name the cases, run none")
    args = parser.parse_args()
    if not (args.rehearse or args.list or torch.cuda.is_available()):
        sys.exit(
            "torch sees no GPU here, so there is nothing to measure; --rehearse runs the same sections on a processor, "
            "with tiny shapes in Triton's interpreter, to show that they work"
        )
    names = ["second"] if args.second else args.only or list(LIMITS)
    limits = {name: LIMITS.get(name, SECOND) for name in names}
    if args.seconds is not None:
        limits = {name: limit * args.seconds / sum(limits.values()) for name, limit in limits.items()}
    with tempfile.TemporaryDirectory() as work:
        run = Run(Path(work), Path(work) if args.list else args.output, args.rehearse)
        if args.list:
            for name in names:
                print(name, *(["all kernels"] if name == "compile" else run.cases(name)), sep="\n  ")
            return
        report = Report(args.output, "second" if args.second else "gpu", facts(args.rehearse))
        until = time.monotonic()
        for name, limit in limits.items():
            until += limit
            run.section(name, report, until)
    report.close()


def facts(rehearse: bool) -> dict[str, str]:
    """The device, its driver, and the versions of what runs on it."""
    if rehearse:
        return {"device": "none: a rehearsal, whose figures mean nothing", "with": versions()}
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if torch.version.hip:
        command = ["rocm-smi", "--showdriverversion", "--csv"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip()
    except OSError as error:
        driver = f"unknown ({error})"
    return {"device": torch.cuda.get_device_name(), "driver": driver, "with": versions()}


class Report:
    """Rows as they come: on the terminal, in NAME.md and in NAME.json."""

    def __init__(self, folder: Path, name: str, about: dict[str, str]):
        folder.mkdir(parents=True, exist_ok=True)
        self.page, self.file = folder / f"{name}.md", folder / f"{name}.json"
        self.rows: list[dict[str, Any]] = []
        self.about, self.section, self.started = about, None, time.monotonic()
        self.page.write_text("", encoding="utf-8")
        self._say("\n".join([f"# {name}", "", *(f"- {key}: {value}" for key, value in about.items())]))

    def add(self, section: str, case: str, status: str, seconds: float, values: dict[str, Any]) -> None:
        """One case. `status`: ok, wrong, failed, crashed, hung or not run."""
        if section != self.section:
            self.section = section
            self._say(f"\n## {section}\n\n| case | status | seconds | result |\n|---|---|---|---|")
        self.rows.append({"section": section, "case": case, "status": status, "seconds": round(seconds, 2), **values})
        text = ", ".join(f"{key} {_short(value)}" for key, value in values.items())
        self._say(f"| {case} | {status} | {seconds:.1f} | {text.replace('|', '/')} |")
        write_text(self.file, json.dumps({**self.about, "rows": self.rows}, indent=1))

    def close(self) -> None:
        bad = [row for row in self.rows if row["status"] != "ok"]
        seconds = time.monotonic() - self.started
        self._say(f"\n{len(self.rows)} cases in {seconds:.0f} s, {len(bad)} of them not ok")
        for row in bad:
            self._say(f"- {row['section']}: {row['case']}: {row['status']}")

    def _say(self, text: str) -> None:
        print(text, flush=True)
        with open(self.page, "a", encoding="utf-8") as file:
            file.write(text + "\n")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_short(inner)}" for key, inner in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Run:
    """Starts the processes, listens to them, and ends them."""

    def __init__(self, work: Path, output: Path, rehearse: bool):
        self.work, self.output, self.rehearse = work, output, rehearse
        self.environment = {**os.environ, "MAMBA2_CACHE": str(work / "cache"), "PYTHONUNBUFFERED": "1"}
        if rehearse:
            self.environment |= {"TRITON_INTERPRET": "1", "MAMBA2_BACKEND": "triton", "CUDA_VISIBLE_DEVICES": ""}

    def cases(self, section: str) -> list[str]:
        with self.start(section, 0, "names") as process:
            return json.loads(process.stdout.readline())["cases"]

    def section(self, name: str, report: Report, until: float) -> None:
        if name == "compile":
            self.compile(report, until)
            return
        start, cases = 0, []
        while start is not None and time.monotonic() < until:
            start = self.listen(name, start, cases, report, until)
        for case in cases[start:] if start is not None else []:
            report.add(name, case, "not run", 0, {"reason": "no time left for it"})
        if not cases:
            report.add(name, "start", "failed", 0, {"reason": "its process ended before it named a case; see gpu.log"})

    def listen(self, name: str, start: int, cases: list[str], report: Report, until: float) -> int | None:
        """One process, from case `start` on. Returns the case that another process should go on with, or None."""
        process, current, began = self.start(name, start), None, time.monotonic()

        def ended(status: str) -> int | None:
            stop(process)
            if current is None:
                return None
            values = {"reason": self.last_words() if status == "crashed" else "out of time"}
            report.add(name, cases[current], status, time.monotonic() - began, values)
            return current + 1 if current + 1 < len(cases) else None

        for event in events(process, lambda: min(until, began + CASE)):  # noqa: B023 (it is meant to move)
            if event is None:
                return ended("hung" if time.monotonic() < until else "not run")
            if "cases" in event:
                cases[:] = event["cases"]
            elif "begin" in event:
                current, began = event["begin"], time.monotonic()
            else:
                report.add(name, cases[current], event["status"], time.monotonic() - began, event["values"])
                last, current = current, None
                if event["lost"]:  # after this error the device refuses this process's work
                    stop(process)
                    return last + 1 if last + 1 < len(cases) else None
        return ended("crashed")

    def compile(self, report: Report, until: float) -> None:
        """Compile the kernels of all other sections' cases, shared among processes that launch none of them."""
        count = 1 if self.rehearse else min(16, os.cpu_count() or 1)
        began = time.monotonic()
        processes = [self.start("compile", i, "compile", count) for i in range(count)]
        done = []
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):  # what it compiled is kept; the sections do the rest
                process.wait(max(0.0, until - time.monotonic()))
            done.append(process.returncode == 0)
            stop(process)
        status = "ok" if all(done) else "failed" if not any(done) else "not run"
        values = {"processes": count, "finished": sum(done)}
        report.add("compile", "all kernels", status, time.monotonic() - began, values)

    def start(self, section: str, start: int, mode: str = "run", of: int = 1) -> subprocess.Popen:
        command = [sys.executable, "-m", "benchmarks.gpu.worker", section, str(start), mode, str(of)]
        command += [str(self.work), str(self.output), *(["--rehearse"] if self.rehearse else [])]
        self.output.mkdir(parents=True, exist_ok=True)
        with open(self.output / "gpu.log", "a", encoding="utf-8") as log:
            return subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, env=self.environment, text=True, start_new_session=True
            )

    def last_words(self) -> str:
        lines = (self.output / "gpu.log").read_text(encoding="utf-8", errors="replace").split("\n")
        return " ".join([line.strip() for line in lines if line.strip()][-3:])[-300:]


def events(process: subprocess.Popen, until: Any) -> Iterator[dict[str, Any] | None]:
    """The process's lines of JSON, decoded; None once, when `until()` has passed."""
    lines: queue.Queue = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(json.loads(line))
        lines.put("end")

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            event = lines.get(timeout=max(0.0, until() - time.monotonic()))
        except queue.Empty:
            yield None
            return
        if event == "end":
            return
        yield event


def stop(process: subprocess.Popen) -> None:
    """End a process and those that it started."""
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


assert set(SECTIONS) == {*LIMITS, "second"} - {"compile"}

if __name__ == "__main__":
    main()
