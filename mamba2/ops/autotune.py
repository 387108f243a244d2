"""MAMBA2_AUTOTUNE=1: choose the launch of a kernel by timing candidates, once per device and shape; kept on disk."""

import json
import os
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from filelock import FileLock

from mamba2.files import write_text
from mamba2.ops.language import triton

Candidate = TypeVar("Candidate")


def autotuning() -> bool:
    return os.environ.get("MAMBA2_AUTOTUNE") == "1"


def fastest(key: str, candidates: Sequence[Candidate], start: Callable[[Candidate], object]) -> Candidate:
    """Return the candidate with which `start` is fastest; the choice is stored under `key` in the file `path()`.

    Candidates are stored by their `repr`; all are timed again if the stored one is no longer in the list. One that does
    not compile for the device, or needs more than the device has, is skipped; RuntimeError if all are. Of several
    processes that share the file one measures, the others wait, and all use its result.
    """
    names = [repr(candidate) for candidate in candidates]
    if read().get(key) not in names:
        path().parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path().with_suffix(".lock")):
            if read().get(key) not in names:
                times = [_seconds(candidate, start) for candidate in candidates]
                if min(times) == float("inf"):
                    raise RuntimeError(f"no launch of {key} compiles for this device; leave MAMBA2_AUTOTUNE unset")
                _write({**read(), key: names[times.index(min(times))]})
    return candidates[names.index(read()[key])]


def path() -> Path:
    """$MAMBA2_CACHE/autotune.json, by default in ~/.cache/mamba2."""
    return Path(os.environ.get("MAMBA2_CACHE", "~/.cache/mamba2")).expanduser() / "autotune.json"


def _seconds(candidate: Candidate, start: Callable[[Candidate], object]) -> float:
    try:
        if torch.cuda.is_available():
            return triton.testing.do_bench(lambda: start(candidate), return_mode="median") / 1e3
        begin = time.perf_counter()
        start(candidate)
        return time.perf_counter() - begin
    except triton.errors.TritonError:  # of the compiler or assembler, or too much shared memory
        return float("inf")
    except RuntimeError as error:
        if "PassManager" not in str(error):  # of the compiler, too; any other is a fault of the kernel
            raise
        return float("inf")


def read() -> dict[str, str]:
    """The stored choices, key -> `repr` of the candidate; empty if there is no file."""
    try:
        return _parse(path(), path().stat().st_mtime_ns)
    except FileNotFoundError:
        return {}


@lru_cache(1)
def _parse(file: Path, changed: int) -> dict[str, str]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not the JSON that MAMBA2_AUTOTUNE=1 writes; delete it to tune anew") from error


def _write(known: dict[str, str]) -> None:
    write_text(path(), json.dumps(known, indent=1, sort_keys=True))
