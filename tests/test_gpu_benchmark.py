"""The command for a GPU, rehearsed without one: every section runs, and nothing that goes wrong in a case is lost."""

import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import kernels, second
from benchmarks.gpu.record import decoded, encoded, tensors_of
from benchmarks.gpu.stand_in import pretend_gpu
from benchmarks.gpu.worker import Bench, Wrong, cases_of, run_cases
from mamba2.ops.kernel import constant
from mamba2.ops.ssd.forward import Edges
from mamba2.ops.ssd.tiles import Sizes, view

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="looks at what is said and done without a GPU")


def run_command(*options: object, code: int = 0) -> subprocess.CompletedProcess:
    whole = [sys.executable, "-m", "benchmarks.gpu", *map(str, options)]
    result = subprocess.run(whole, capture_output=True, text=True)
    assert result.returncode == code, result.stderr[-2000:]
    return result


@WITHOUT_GPU
def test_without_a_gpu_one_sentence_says_so_and_what_a_rehearsal_is():
    said = run_command(code=1).stderr
    assert "torch sees no GPU here" in said and "--rehearse" in said and len(said.splitlines()) == 1


@WITHOUT_GPU
@pytest.mark.slow
def test_a_rehearsal_compiles_and_runs_sections_in_processes_of_their_own(tmp_path):
    run_command("--rehearse", "--only", "compile", "tuned", "--output", tmp_path, "--seconds", 600)
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["section"]: row["status"] for row in rows} == {"compile": "ok", "tuned": "ok"}, rows
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"| {row['case']} | ok |" in page for row in rows)


@WITHOUT_GPU
@pytest.mark.slow
@pytest.mark.parametrize("section", [name for name in command.LIMITS if name not in ("compile", "tuned")])
def test_a_rehearsal_runs_every_case(section, tmp_path, monkeypatch):
    """In this process, where the interpreter is faster."""
    for name, value in (("MAMBA2_BACKEND", "triton"), ("MAMBA2_CACHE", str(tmp_path / "cache"))):
        monkeypatch.setenv(name, value)
    said = []
    with pretend_gpu():
        cases = cases_of(section, Bench(tmp_path, tmp_path, rehearse=True))
        run_cases(cases, 0, lambda **event: said.append(event))
    ends = [event for event in said if "status" in event]
    assert len(ends) == len(cases) and [end for end in ends if end["status"] != "ok"] == []
    if section == "kernels":
        ours = {"_decays_kernel", "_decays_gradient_kernel", "_walk_kernel", "_pass_kernel", "_gradient_kernel"}
        assert {*ours, "_step_kernel"} <= {case.split(",")[0] for case in cases}


class FakeRun(command.Run):
    """Its section is a script of its own: a good case, one that ends its process, one that hangs, a good one."""

    SCRIPT = """
import json, os, sys, time
def say(**event): print(json.dumps(event), flush=True)
say(cases=["good", "crash", "hang", "lost", "last"])
for i in range(int(sys.argv[1]), 5):
    say(begin=i)
    if i == 1: print("the reason", file=sys.stderr, flush=True); os._exit(3)
    if i == 2: time.sleep(60)
    say(status="failed" if i == 3 else "ok", values={"i": i}, lost=i == 3)
    if i == 3: time.sleep(60)
"""

    def start(self, section: str, start: int, mode: str = "run", of: int = 1) -> subprocess.Popen:
        with open(self.output / "gpu.log", "a") as log:
            pipes = {"stdout": subprocess.PIPE, "stderr": log, "text": True}
            command = [sys.executable, "-c", self.SCRIPT, str(start)]
            return subprocess.Popen(command, **pipes, start_new_session=True)


@pytest.mark.parametrize(
    ("seconds", "ends"), [(60, ["ok", "crashed", "hung", "failed", "ok"]), (3, ["ok", "crashed", *["not run"] * 3])]
)
def test_a_case_that_crashes_hangs_or_loses_the_device_costs_itself_alone(tmp_path, monkeypatch, seconds, ends):
    """And where there is no more time the cases that are left are named."""
    monkeypatch.setattr(command, "CASE", 2 if seconds == 60 else command.CASE)
    report = command.Report(tmp_path, "gpu", {})
    FakeRun(tmp_path, tmp_path, rehearse=True).section("kernels", report, time.monotonic() + seconds)
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [(row["case"], row["status"]) for row in rows] == [*zip(("good", "crash", "hang", "lost", "last"), ends)]
    assert "the reason" in (tmp_path / "gpu.md").read_text()


def test_a_kernel_that_leaves_other_values_is_wrong():
    def launch(tensor: torch.Tensor) -> dict:
        args = (torch.ones(3, 8), torch.zeros(8), None, None, None, 3, 8, 8, 0, 0)
        return {
            "case": "_sum",
            "kernel": ("mamba2.ops.kernel", "_sum_rows_kernel"),
            "grid": (1,),
            "before": (encoded(args), {"ROWS": 16, "COLUMNS": 8}),
            "after": [torch.ones(3, 8), tensor],
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        assert kernels.start(launch(torch.full((8,), 3.0)))["error / bound"] < 1
        for other in (torch.full((8,), 3.1), torch.zeros(8), torch.full((8,), float("nan"))):
            with pytest.raises(Wrong, match="error / bound"):
                kernels.start(launch(other))


def test_what_a_case_raises_is_a_row():
    said = []

    def wrong() -> dict:
        raise Wrong({"error": 2.0})

    cases = {"good": lambda: {"a": 1}, "wrong": wrong, "failed": lambda: {}["missing"], "after": dict}
    run_cases(cases, 0, lambda **event: said.append(event))
    assert [event["status"] for event in said if "status" in event] == ["ok", "wrong", "failed", "ok"]
    assert said[3]["values"] == {"error": 2.0} and "KeyError" in said[5]["values"]["reason"]


def test_the_profilers_table_is_read_and_failed_cases_come_first(tmp_path):
    report = (
        "==PROF== Connected\n"
        '"ID","Kernel Name","gpu__time_duration.sum","lts__t_sector_hit_rate.pct"\n'
        '"","","ns","%"\n"0","_walk_kernel","2000","50.5"\n"1","_walk_kernel","1000","60"\n"2","_gradient_kernel","9","1"\n'
    )
    assert second.parse(report) == {
        "_walk_kernel": {"ns": "1000", "L2 hits %": "60"},
        "_gradient_kernel": {"ns": "9", "L2 hits %": "1"},
    }
    rows = [{"section": "right", "case": "repeated runs of ssd", "status": "wrong"}]
    (tmp_path / "gpu.json").write_text(json.dumps({"rows": rows}))
    names = list(second.cases(Bench(tmp_path, tmp_path, rehearse=True)))
    assert names[0] == "compute-sanitizer, right: repeated runs of ssd" and "Nsight Compute" in names[1]


def test_arguments_inside_tuples_survive_the_file():
    tensor = torch.arange(6.0).view(2, 3).t()
    args = (view(tensor), Sizes(*map(constant, range(10))), Edges(None, tensor, None), (1, tensor), 2.0)
    back = decoded(encoded(args))
    assert [type(a) for a in back] == [type(a) for a in args]
    assert back[0].strides.value == (3,) and [field.value for field in back[1]] == list(range(10))
    assert len(tensors_of(back)) == 3 and all(t.stride() == (1, 3) for t in tensors_of(back))


@pytest.mark.slow
def test_a_list_of_the_cases_writes_nothing(tmp_path):
    said = run_command("--rehearse", "--list", "--only", "compile", "fast", "--output", tmp_path / "new").stdout
    assert said.startswith("compile\n  all kernels\nfast\n") and "mamba-ssm" in said
    assert not (tmp_path / "new").exists()
