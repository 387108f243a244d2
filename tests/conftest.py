"""Before anything imports Triton: with no GPU its kernels run in the interpreter, on a machine with one compiled.

`@triton.jit` looks at TRITON_INTERPRET when it decorates, so the choice holds for the whole process; the tests that
compile for real targets start a process of their own.

Before anything imports torch: where pytest runs in several processes (-n), each has its share of the cores. Threads
that wait for work spin, and those of two processes would keep each other from it.
"""

import os
from collections.abc import Callable
from pathlib import Path

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import pytest
import torch

# The files that take longest, which several processes begin with, so that they end together.
LONGEST = ("test_train.py", "test_compilation.py", "test_scripts.py", "test_gpu_benchmark.py", "test_decoding.py")


def pytest_collection_modifyitems(items: list) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op runs by its Triton kernels."""
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `tests.runs.make_study`."""
    from tests.runs import make_study

    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def run(study: Path, tmp_path: Path) -> Callable[..., Path]:
    """train.py on the study with these options, into run/ or another folder of the test's own; returns that."""
    from tests.runs import arguments, run_train

    def run(*options: object, into: str = "run") -> Path:
        run_train(*arguments(study, tmp_path / into, *options))
        return tmp_path / into

    return run


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks.interpreter import prepare_interpreter

    prepare_interpreter()
