"""Finding lost ranks: an interruptible wait for a device, and a thread that answers for a rank inside a collective.

Python handles signals between two of its own instructions, and a collective is one of them, so a rank that waits in a
collective reacts to nothing. Each rank therefore has a watchdog thread, which signals reach. Ranks talk through the
group's store: `asked` is set once a rank suspects that another one is lost; then each rank R that is alive sets `at R`,
the operation that it is in; `left R` is set when rank R has left the group.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable

import torch.distributed as dist

import castalia
from castalia.parallel.launcher import STOP_SIGNALS

POLL_S = 0.5  # between two reads of the store
PATIENCE_S = 15.0  # after a signal, for the others to answer; torchrun kills after 30 s or more
ENDED = "ended by an error"  # a key of the run's store: restarted processes exit at once
OURS = os.path.dirname(castalia.__file__) + os.sep
# Frames of these files do not say what a rank was working on.
MACHINERY = tuple(f"{OURS}parallel{os.sep}{name}.py" for name in ("watchdog", "process_group"))


class RankLost(RuntimeError):
    """Another rank did not do its part in time."""


def wait_until(done: Callable[[], bool], timeout_s: float) -> None:
    """Polls until `done()` is true, for example until a device has finished. Unlike in a blocking call, signals and
    errors get through.

    Raises RankLost after `timeout_s` seconds, as a collective on the host would.
    """
    end = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > end:
            raise RankLost(f"what was asked for has not come within {timeout_s:g} s")
        time.sleep(2e-4)


def operation(frames: Iterable[traceback.FrameSummary]) -> str:
    """The innermost function of a stack (outermost frame first), and the function of this package that called it."""
    stack = [frame for frame in frames if not frame.filename.startswith(MACHINERY)]
    in_package = [frame for frame in stack if frame.filename.startswith(OURS)] or stack
    where = f"{in_package[-1].name} ({os.path.basename(in_package[-1].filename)}:{in_package[-1].lineno})"
    return where if in_package[-1] is stack[-1] else f"{stack[-1].name}, called by {where}"


def operations(group: dist.Store, ranks: Iterable[int]) -> str:
    """Which operation each of the ranks is in, or that it does not answer, as one line of text."""
    answers = []
    for rank in ranks:
        has_answered = group.check([f"at {rank}"])
        answer = f"is in {group.get(f'at {rank}').decode()}" if has_answered else "does not answer"
        answers.append(f"rank {rank} {answer}")
    return "; ".join(answers)


class Watchdog:
    """Answers for its rank, and ends the process where the rank waits in vain.

    That is so after a signal if another rank does not answer, and after an error that another rank has reported. A
    context manager; the thread runs while it is open.
    """

    def __init__(
        self, store: dist.TCPStore, group: dist.PrefixStore, rank: int, world: int, patience_s: float = PATIENCE_S
    ) -> None:
        """`store` is the run's, `group` the part of it that belongs to this process group."""
        # The thread needs connections of its own: those of the rank may be blocked in a wait.
        self.store, self.group = store.clone(), group.clone()  # type: ignore[attr-defined]
        self.rank, self.world, self.patience_s = rank, world, patience_s
        self.caller = threading.get_ident()
        self.leaving = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        # Python's own handlers do not run during a collective, but C code writes each signal's number to this socket.
        self.signals, self.wakeup = socket.socketpair()
        self.signals.setblocking(False)
        self.wakeup.setblocking(False)
        self.is_main = threading.current_thread() is threading.main_thread()  # signals reach no other thread
        if self.is_main:
            self.before = signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.is_main:
            signal.set_wakeup_fd(self.before)
        self.leaving.set()
        self.thread.join(4 * POLL_S)
        self.signals.close()
        self.wakeup.close()

    def _watch(self) -> None:
        answered, ended, stop, since = False, False, 0, math.inf
        try:
            while not self.leaving.wait(POLL_S):
                if not (stop or ended):
                    stop, ended = self._signal(), self.store.check([ENDED])
                    if stop or ended:
                        self.group.set("asked", "")
                        since = time.monotonic()
                if not answered and self.group.check(["asked"]):
                    self.group.set(f"at {self.rank}", operation(self._stack()))
                    answered = True
                if time.monotonic() > since + self.patience_s:
                    if self.store.check([ENDED]):  # another rank has said why
                        os._exit(2)
                    if lost := self._lost():
                        self._give_up(signal.Signals(stop), lost)
            self.group.set(f"left {self.rank}", "")
        except dist.DistError:  # the store is gone: rank 0 has ended, and collectives show whether that is an error
            return

    def _signal(self) -> int:
        """The number of the first signal that asks for an end; 0 if none came."""
        try:
            received = self.signals.recv(64)
        except BlockingIOError:
            return 0
        return next((number for number in received if number in STOP_SIGNALS), 0)

    def _stack(self) -> traceback.StackSummary:
        return traceback.extract_stack(sys._current_frames()[self.caller])

    def _lost(self) -> list[int]:
        """The ranks that neither answer nor have left."""
        group, ranks = self.group, range(self.world)
        return [rank for rank in ranks if not (group.check([f"at {rank}"]) or group.check([f"left {rank}"]))]

    def _give_up(self, stop: signal.Signals, lost: list[int]) -> None:
        if self.group.add("told", 1) == 1:
            who = "rank " + ", ".join(map(str, lost))
            print(
                f"error: {stop.name} came, but {who} does not answer, and rank {self.rank} waits in "
                f"{operation(self._stack())}: stopped without saving; what was saved before is whole",
                file=sys.stderr,
                flush=True,
            )
        os._exit(128 + stop)
