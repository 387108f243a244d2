"""MAMBA2_AUTOTUNE=1: choose how a kernel is started by timing it, once per device and shape; kept on disk."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import triton

Candidate = TypeVar("Candidate")


def autotuning() -> bool:
    return os.environ.get("MAMBA2_AUTOTUNE") == "1"


def fastest(key: str, candidates: Sequence[Candidate], start: Callable[[Candidate], object]) -> Candidate:
    """The candidate with which `start` takes the least time; remembered under `key` in the file of `path`.

    Candidates are told apart by their `repr`, so that a result is measured again when the list changes. A candidate
    that the device cannot run (too much shared memory) is passed over.
    """
    names = [repr(candidate) for candidate in candidates]
    known = _read()
    if known.get(key) not in names:
        times = [_seconds(candidate, start) for candidate in candidates]
        known = _read()  # another process may have added to it meanwhile
        known[key] = names[times.index(min(times))]
        _write(known)
    return candidates[names.index(known[key])]


def path() -> Path:
    """$MAMBA2_CACHE/autotune.json, by default in ~/.cache/mamba2."""
    return Path(os.environ.get("MAMBA2_CACHE", "~/.cache/mamba2")).expanduser() / "autotune.json"


def _seconds(candidate: Candidate, start: Callable[[Candidate], object]) -> float:
    try:
        if torch.cuda.is_available():
            return triton.testing.do_bench(lambda: start(candidate)) / 1e3
        begin = time.perf_counter()
        start(candidate)
        return time.perf_counter() - begin
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def _read() -> dict[str, str]:
    try:
        return json.loads(path().read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path()} is not the JSON that MAMBA2_AUTOTUNE=1 writes; delete it to tune anew") from error


def _write(known: dict[str, str]) -> None:
    path().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path().parent, prefix="autotune-", delete=False) as file:
        json.dump(known, file, indent=1, sort_keys=True)
    os.replace(file.name, path())
