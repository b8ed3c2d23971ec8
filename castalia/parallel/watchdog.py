"""Who is lost: waiting for a device that can be interrupted, and a thread that answers for a rank which waits.

In a collective a process is deaf: Python handles signals between two of its own instructions, and the collective is
one. So each rank has a thread that the signal reaches. In the group's store ranks tell each other `asked` once one of
them suspects that another is lost, then `at R`, the operation that rank R is in, and `left R` when it is done.
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

LOOK_S = 0.5  # between two looks at the store
PATIENCE_S = 15.0  # after a signal, for the others to answer; torchrun kills after 30 s or more
ENDED = "ended by an error"  # a key of the run's store: no restart is to try again
OURS = os.path.dirname(castalia.__file__) + os.sep
MACHINERY = tuple(f"{OURS}parallel{os.sep}{name}.py" for name in ("lookout", "process"))  # in which nobody is at work


class RankLost(RuntimeError):
    """Another rank did not do its part in time."""


def wait_until(done: Callable[[], bool], timeout_s: float) -> None:
    """Returns when `done` does: a device has finished, say. Signals and errors get through, unlike in a blocking call.

    Raises RankLost when time is up, as a collective of the host does.
    """
    end = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > end:
            raise RankLost(f"what was asked for has not come within {timeout_s:g} s")
        time.sleep(2e-4)


def operation(frames: Iterable[traceback.FrameSummary]) -> str:
    """The operation that a stack ends in, and who of us called it."""
    stack = [frame for frame in frames if not frame.filename.startswith(MACHINERY)]
    ours = [frame for frame in stack if frame.filename.startswith(OURS)] or stack
    where = f"{ours[-1].name} ({os.path.basename(ours[-1].filename)}:{ours[-1].lineno})"
    return where if ours[-1] is stack[-1] else f"{stack[-1].name}, called by {where}"


def operations(group: dist.Store, ranks: Iterable[int]) -> str:
    """Where the ranks are, as far as they answer, in words."""
    told = []
    for rank in ranks:
        is_told = group.check([f"at {rank}"])
        told.append(f"rank {rank} {'is in ' + group.get(f'at {rank}').decode() if is_told else 'does not answer'}")
    return "; ".join(told)


class Watchdog:
    """Answers for its rank, and ends it where it waits in vain: after a signal if another one is lost, and after an
    error that another one has told.
    """

    def __init__(
        self, store: dist.TCPStore, group: dist.PrefixStore, rank: int, world: int, patience_s: float = PATIENCE_S
    ) -> None:
        # Connections of its own: the rank's may be waiting.
        self.store, self.group = store.clone(), group.clone()  # type: ignore[attr-defined]
        self.rank, self.world, self.patience_s = rank, world, patience_s
        self.caller = threading.get_ident()
        self.leaving = threading.Event()
        self.thread = threading.Thread(target=self._look, name="lookout", daemon=True)

    def __enter__(self) -> Watchdog:
        self.ear, self.mouth = socket.socketpair()
        self.ear.setblocking(False)
        self.mouth.setblocking(False)
        self.is_main = threading.current_thread() is threading.main_thread()  # signals reach no other thread
        if self.is_main:
            self.before = signal.set_wakeup_fd(self.mouth.fileno(), warn_on_full_buffer=False)
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.is_main:
            signal.set_wakeup_fd(self.before)
        self.leaving.set()
        self.thread.join(4 * LOOK_S)
        self.ear.close()
        self.mouth.close()

    def _look(self) -> None:
        answered, ended, stop, since = False, False, 0, math.inf
        try:
            while not self.leaving.wait(LOOK_S):
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
        except dist.DistError:  # the store is gone, and rank 0 with it, or done: collectives say which
            return

    def _signal(self) -> int:
        """The first of the signals that ask for an end; 0 if none came."""
        try:
            came = self.ear.recv(64)
        except BlockingIOError:
            return 0
        return next((number for number in came if number in STOP_SIGNALS), 0)

    def _stack(self) -> traceback.StackSummary:
        return traceback.extract_stack(sys._current_frames()[self.caller])

    def _lost(self) -> list[int]:
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
