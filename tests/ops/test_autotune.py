"""MAMBA2_AUTOTUNE=1: what is passed over, what is told apart, and that processes agree."""

import json
import threading
import time

import pytest
import torch
from filelock import FileLock
from triton.runtime.errors import OutOfResources, PTXASError

from mamba2.ops import autotune
from mamba2.ops.ssd.op import _Plan, _Run, _sizes
from tests.ops.test_ssd import make_inputs


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MAMBA2_CACHE", str(tmp_path))
    monkeypatch.setenv("MAMBA2_AUTOTUNE", "1")
    return tmp_path / "autotune.json"


def starts(errors: dict[str, Exception]):
    def start(candidate: str) -> None:
        if candidate in errors:
            raise errors[candidate]
        time.sleep(0.001 if candidate == "fast" else 0.02)

    return start


@pytest.mark.parametrize(
    "error", [PTXASError("too many registers"), OutOfResources(2, 1, "shared memory"), RuntimeError("PassManager::run")]
)
def test_what_does_not_compile_is_passed_over(error):
    assert autotune.fastest("key", ["broken", "slow", "fast"], starts({"broken": error})) == "fast"
    with pytest.raises(RuntimeError, match="no launch of other compiles for this device"):
        autotune.fastest("other", ["broken"], starts({"broken": error}))


def test_a_fault_of_a_kernel_is_not_passed_over():
    with pytest.raises(RuntimeError, match="illegal memory access"):
        autotune.fastest("key", ["broken", "fast"], starts({"broken": RuntimeError("illegal memory access")}))


def test_a_process_waits_for_another_that_measures_and_takes_what_it_found(cache):
    taken, started = [], []
    with FileLock(cache.with_suffix(".lock")):
        waiting = threading.Thread(target=lambda: taken.append(autotune.fastest("key", ["a", "b"], started.append)))
        waiting.start()
        time.sleep(0.2)
        cache.write_text(json.dumps({"key": "'b'"}))
    waiting.join(10)
    assert taken == ["b"] and not started


def test_sizes_are_told_apart():
    tried: list = []

    def choose(b: int, l: int) -> None:
        tensors = [t.detach() for t in make_inputs(b, l, 4, 64, 1, 128, torch.bfloat16, ()).values()]
        plan = _Plan(*_sizes(tensors[0], tensors[3], None))
        _Run(plan, [*tensors, None, None, None, None], (True, 0.0, 1.0), [None] * 4).launch("states", tried.append)

    choose(2, 1000)
    assert len(tried) > 4 and {launch.p_tile for launch in tried} == {16, 64}
    taken = tried.pop()
    assert taken in tried  # the fastest, started once more
    tried.clear()
    choose(2, 1024)  # the same to a power of two
    assert tried == [taken]
    tried.clear()
    choose(1, 1024)
    assert len(tried) > 4
