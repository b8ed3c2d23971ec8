"""Signals that ask a run to save and end."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time

from castalia.parallel.launcher import STOP_SIGNALS
from castalia.parallel.rendezvous import is_main

TOGETHER_S = 1.0  # signals within this time of each other count as one
CLOSED = 0  # no signal's number


class StopSignals:
    """While open, the first signal that asks for an end is noted and answered, and a later one ends the process.

    Launchers pass on what the terminal has already sent to all processes, so signals that arrive together with the
    first one do not count. Python calls handlers between two of its own instructions, and a backward pass is one of
    them, which may take minutes on a CPU. C code therefore writes each signal's number into a socket, and a thread
    reads it at once.
    """

    def __init__(self, place: str = "micro-batch") -> None:
        """`place`: after what the run stops, for the answer."""
        self.place = place
        self.received: str | None = None  # the first signal's name
        self.since = 0.0
        self._before: dict[signal.Signals, object] = {}
        self._one_at_a_time = threading.RLock()  # a handler may be interrupted by another one

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # signals reach no other thread
            self._reader, self._writer = socket.socketpair()
            self._reader.setblocking(False)
            self._writer.setblocking(False)
            for number in STOP_SIGNALS:
                # nohup ignores SIGHUP so that a run survives its terminal; it stays ignored.
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, lambda *_: self._read())
            self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, name="stop signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
        self._writer.send(bytes([CLOSED]))
        self._thread.join()
        self._reader.close()
        self._writer.close()

    def _watch(self) -> None:
        while True:
            select.select([self._reader], [], [])
            if CLOSED in self._read():
                return

    def _read(self) -> bytes:
        """Notes the signals that came since the last call. Whichever thread comes first has them."""
        with self._one_at_a_time:
            try:
                numbers = self._reader.recv(64)
            except BlockingIOError:
                return b""
            if self._fd_before != -1:  # that of a group's watchdog, which waits for signals as well
                os.write(self._fd_before, bytes(number for number in numbers if number != CLOSED))
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._note(number)
            return numbers

    def _note(self, number: int) -> None:
        if self.received and time.monotonic() - self.since > TOGETHER_S:
            os._exit(128 + number)
        if not self.received:
            self.received, self.since = signal.Signals(number).name, time.monotonic()
            if is_main():
                os.write(2, f"{self.received}: stopping after this {self.place}; again to stop at once\n".encode())
