"""The estimate of a kernel's time: what it reads off machine code, and what it counts in the interpreter."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.estimate import DEVICES, Bounds, Instruction, latency, operations, shared_bytes, tensors_in
from mamba2.ops.ssd.tiles import view

SHAPE = (1, 300, 2, 32, 1, 32)  # five chunks, three spans, the last of one chunk

SCRIPT = f"""
import json
from benchmarks.estimate import bounds_of, trips
shape = {SHAPE}
found = [[b._asdict() for b in part] for part in bounds_of("mamba2", shape, "plain", "sm_90", 0)]
print(json.dumps([found, trips("mamba2", shape, "plain", "sm_90", 0)]))
"""


@pytest.mark.slow
def test_trips_are_counted_and_every_bound_is_a_time():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["MAMBA2_BACKEND"] = "triton"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    (forward, backward), (walked, _) = json.loads(result.stdout)
    assert [b["kernel"] for b in forward] == [lines["kernel"] for lines in walked]
    for b in (*forward, *backward):
        values = [value for name, value in b.items() if name != "kernel"]
        assert all(0 <= value < 1e4 for value in values) and b["bytes"] > 0 and b["issue"] > 0, b
    walk = next(lines["lines"] for lines in walked if lines["kernel"] == "_walk_kernel")
    chunks = [n for line, n in walk.items() if "forward.py" in line]
    assert max(chunks) >= 1 and all(n == round(n) for n in chunks)  # the same in every program


def test_an_iteration_waits_for_what_it_needs_and_no_longer():
    load = Instruction("LDS R0, [R1]", ("", 0), stall=1, sets=0, waits=0)
    add = Instruction("FADD R2, R0, R0", ("", 0), stall=4, sets=7, waits=1)
    other = Instruction("FADD R3, R4, R4", ("", 0), stall=4, sets=7, waits=0)
    assert latency([load, add]) == 30 + 4
    assert latency([load, *[other] * 10, add]) == 1 + 40 + 4  # the load is back before it is needed
    assert latency([other] * 20) == 2 * latency([other] * 10) == 80


@pytest.mark.parametrize(
    ("op", "flop", "shared"),
    [
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24", 2 * 64 * 128 * 16 / 4, 2 * 128 * 16 / 4),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", 2 * 16 * 8 * 16 / 0.62, 0),
        ("LDSM.16.M88.4 R4, [R2]", 0, 512),
        ("LDS.64 R4, [R2]", 0, 256),
        ("STS R4, [R2]", 0, 128),
        ("FADD R4, R2, R2", 0, 0),
    ],
)
def test_what_an_instruction_costs(op, flop, shared):
    assert operations(op, DEVICES["sm_90"]) == pytest.approx(flop)
    assert shared_bytes(op) == shared


def test_the_largest_bound_binds_and_the_launch_comes_on_top():
    b = Bounds("_kernel", 1.0, 3.0, 2.0, 0.0, 0.0, 2.5)
    assert b.time == 5.0 and b.binds == "issue"
    assert math.isinf(Bounds("_kernel", *[math.inf] * 6).time)


def test_tensors_inside_tuples_are_seen():
    tensor = torch.zeros(2, 3, 4)
    assert len(tensors_in((view(tensor), (1, None, [tensor]), 2.0))) == 2
