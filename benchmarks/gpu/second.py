"""A closer look after a first run: its failed cases under compute-sanitizer, ssd's kernels under Nsight Compute."""

import csv
import functools
import json
import os
import shutil
import subprocess
import sys

from benchmarks.gpu.right import FORMS
from benchmarks.gpu.worker import Bench, Case, Wrong, cases_of

# Issue slots, why warps wait, how much of L2's traffic hits, by Nsight Compute's names.
METRICS = {
    "gpu__time_duration.sum": "ns",
    "sm__inst_executed.sum": "warp instructions",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue slots %",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor pipe %",
    "dram__bytes.sum": "DRAM bytes",
    "lts__t_sector_hit_rate.pct": "L2 hits %",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank conflicts",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "stalled: barrier",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "stalled: memory",
    "smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio": "stalled: shared memory",
    "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio": "stalled: math pipe",
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": "stalled: fixed latency",
    "smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio": "stalled: wgmma",
}


def cases(bench: Bench) -> dict[str, Case]:
    found: dict[str, Case] = {}
    for form in FORMS:
        for i, name in enumerate(cases_of("fast", bench)):
            if name.startswith(f"mamba2 {form}"):
                found[f"Nsight Compute, {name}"] = functools.partial(counters, bench, i)
    first = bench.output / "gpu.json"
    rows = json.loads(first.read_text(encoding="utf-8"))["rows"] if first.exists() else []
    for row in rows:
        if row["section"] in ("kernels", "right") and row["status"] in ("wrong", "failed", "crashed", "hung"):
            names = list(cases_of(row["section"], bench))
            if row["case"] in names:
                number = names.index(row["case"])
                again = functools.partial(sanitized, bench, row["section"], number)
                found = {f"compute-sanitizer, {row['section']}: {row['case']}": again, **found}
    return found


def one_case(bench: Bench, section: str, number: int) -> list[str]:
    """A command that runs one case of a section and no other."""
    code = "import pathlib, sys; from benchmarks.gpu.worker import Bench, cases_of; "
    code += "bench = Bench(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]), compiling=True); "
    code += "list(cases_of(sys.argv[1], bench).values())[int(sys.argv[4])]()"
    return [sys.executable, "-c", code, section, str(bench.work), str(bench.output), str(number)]


def sanitized(bench: Bench, section: str, number: int) -> dict[str, object]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"not run": "compute-sanitizer is not on this machine"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *one_case(bench, section, number)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=55, env=os.environ)
    errors = [line.removeprefix("=========").strip() for line in result.stdout.splitlines() if line[:1] == "="]
    if result.returncode:
        raise Wrong({"exit code": result.returncode, "report": errors[:6], "error": result.stderr[-300:]})
    return {"memcheck": "no error"}


def counters(bench: Bench, number: int) -> dict[str, object]:
    """One call forward and backward, after two others."""
    tool = shutil.which("ncu")
    if tool is None:
        return {"not run": "ncu is not on this machine"}
    command = [tool, "--csv", "--page", "raw", "--clock-control", "none", "--metrics", ",".join(METRICS)]
    command += ["--kernel-name", "regex:_(scan|states|reverse|gradient|decays|finish)_kernel"]
    result = subprocess.run(
        [*command, *one_case(bench, "fast", number)], capture_output=True, text=True, timeout=55, env=os.environ
    )
    table = parse(result.stdout)
    if not table:
        raise Wrong({"ncu": (result.stderr + result.stdout)[-300:]})
    return table


def parse(report: str) -> dict[str, dict[str, str]]:
    """The last launch of each kernel in ncu's raw page as CSV: a line of names, one of units, one for each launch."""
    lines = [line for line in report.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))[1:]
    return {row["Kernel Name"]: {title: row[name] for name, title in METRICS.items() if row.get(name)} for row in rows}
