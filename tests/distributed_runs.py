"""Training by several processes on this machine's processor, as torchrun starts them."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from tests.runs import interrupt_after, run_train

SECONDS = 120


def spawn(function: Callable[..., None], size: int, *args: object) -> list[int]:
    """Run function(*args) in `size` processes that can find each other; returns their exit codes.

    They are forked from a process that has imported torch and does nothing, so each is there at once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed_runs"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_child, args=(rank, size, port, function, args)) for rank in range(size)]
    for process in processes:
        process.start()
    codes = []
    for process in processes:
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        codes.append(process.exitcode)
    return codes


def _child(rank: int, size: int, port: int, function: Callable[..., None], args: tuple) -> None:

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    function(*args)


def train(command: list[str], cache: Path, stop_after: int | None = None, on_rank: int = 0) -> None:
    """train.py; a signal comes to process `on_rank` in the middle of its `stop_after`-th step."""
    import pytest

    os.environ["MAMBA2_CACHE"] = str(cache)
    with pytest.MonkeyPatch.context() as patch:
        if stop_after is not None and int(os.environ["RANK"]) == on_rank:
            interrupt_after(patch, stop_after)
        run_train(*command)
    sys.exit(0)
