"""Signals that ask a run to save and end."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from castalia.parallel.launcher import STOP_SIGNALS
from castalia.parallel.rendezvous import is_main

TOGETHER_S = 1.0  # signals within this time of each other count as one


class StopSignals:
    """While open, the first signal that asks for an end is noted, and a later one kills the process.

    Launchers pass on what the terminal has already sent to all processes, so signals that arrive together with the
    first one do not count.
    """

    def __init__(self) -> None:
        self.received: str | None = None  # the first signal's name
        self.since = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # signals reach no other thread
            for number in STOP_SIGNALS:
                # nohup ignores SIGHUP so that a run survives its terminal; it stays ignored.
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and time.monotonic() - self.since > TOGETHER_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.received:
            self.received, self.since = signal.Signals(number).name, time.monotonic()
            if is_main():
                os.write(2, f"{self.received}: this step ends and is saved; again to stop at once\n".encode())
