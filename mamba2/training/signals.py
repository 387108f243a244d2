"""SIGTERM, SIGINT and SIGUSR1 end a run after the step that is under way, with a checkpoint."""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Self


class Stop:
    """Inside `with Stop() as stop`, `stop.signal` is the number of the signal that came, 0 while none did.

    A handler only takes note, so a save that is under way is finished. A second SIGINT stops at once.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

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
        # Not print: a handler may run in the middle of another print.
        os.write(sys.stderr.fileno(), f"{signal.Signals(number).name}: stops after this step\n".encode())
