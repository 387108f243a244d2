"""SIGTERM, SIGINT and SIGUSR1 end a run with a checkpoint after the current step."""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Self


class Stop:
    """Inside `with Stop() as stop`, `stop.signal` is the number of the last signal received, or 0.

    The handler only records the signal, so that a save in progress completes. A second SIGINT stops immediately.
    """

    # Windows has no SIGUSR1.
    SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        # Not print, which the handler may have interrupted.
        os.write(sys.stderr.fileno(), f"{signal.Signals(number).name}: stops after this step\n".encode())
