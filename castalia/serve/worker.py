"""The one thread in which all models compute, a step of each in turn."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from castalia.errors import CastaliaError, out_of_memory
from castalia.serve.engine import Engine

log = logging.getLogger("castalia.serve")
SIGN_SECONDS = 60.0  # after which other processes hear that there was nothing to do; they wait for ten minutes


class Worker:
    """Runs the steps of engines, and functions between them."""

    def __init__(self, sign: Callable[[], None] | None = None) -> None:
        """`sign`: tells other processes, which take the same steps, that there was nothing to do for a while.

        With it, what fails by surprise ends the server, since the others may stand at another place then.
        """
        self.engines: list[Engine] = []
        self.calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self.change = threading.Condition()
        self.stopped = False
        self.sign = sign
        self.lost: str | None = None  # why nothing can be computed any more
        self.posted: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue, Any]]] = {}
        self.thread = threading.Thread(target=self._run, name="castalia-worker", daemon=True)
        self.thread.start()

    def wake(self) -> None:
        """Say that an engine has something to do."""
        with self.change:
            self.change.notify()

    def call(self, function: Callable[[], Any]) -> Future:
        """Run a function between two steps; its result or its error is that of the future."""
        future: Future = Future()
        with self.change:
            self.calls.append((function, future))
            self.change.notify()
        return future

    def post(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue, value: Any) -> None:
        """Put a value into a queue of another thread's loop after this step; called in a step.

        All values together wake that thread once, when it disturbs no more: both need Python's lock.
        """
        self.posted.setdefault(loop, []).append((queue, value))

    def stop(self) -> None:
        """End after the step that runs."""
        with self.change:
            self.stopped = True
            self.change.notify()
        self.thread.join()

    def _run(self) -> None:
        while not self.stopped:
            self._round()
        while self.calls:  # whoever waits for them would wait for ever
            self.calls.popleft()[1].cancel()

    def _round(self) -> None:
        """Wait for work and do it. While it waits, nothing here refers to a model, which may be dropped meanwhile."""
        with self.change:
            while not (self.stopped or self.calls or any(engine.busy for engine in self.engines)):
                if not self.change.wait(None if self.sign is None else SIGN_SECONDS):
                    break
            if self.stopped:
                return
            engines = [engine for engine in self.engines if engine.busy]
            call = self.calls.popleft() if self.calls else None
        if self.sign is not None and not (engines or call or self.lost):
            self._guarded(self.sign)
        if call is not None:
            self._answer(*call)
        for engine in engines:
            if message := self.lost or self._guarded(engine.step):
                engine.fail(message)
            while self.posted:
                loop, values = self.posted.popitem()
                with suppress(RuntimeError):  # the loop is closed, so that nobody waits there
                    loop.call_soon_threadsafe(_put_all, values)

    def _answer(self, function: Callable[[], Any], future: Future) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            if self.lost is not None:
                raise CastaliaError(self.lost)
            future.set_result(function())
        except Exception as error:  # whoever waits for the future gets it
            self._note(error)
            future.set_exception(error)

    def _guarded(self, function: Callable[[], None]) -> str | None:
        """Why the function failed; None if it did not."""
        try:
            function()
        except Exception as error:  # the texts of this model end with it, those of others go on
            message = str(error) if isinstance(error, CastaliaError) else out_of_memory(error)
            if message is None:
                log.exception("a step failed")
            self._note(error)
            return message or f"the server could not compute a step: {type(error).__name__}"
        return None

    def _note(self, error: Exception) -> None:
        """Begin to end where other processes may stand at another place."""
        if self.sign is not None and not isinstance(error, CastaliaError) and self.lost is None:
            self.lost = f"the processes of this server have lost each other, and it ends: {type(error).__name__}"
            log.error(self.lost)
            os.kill(os.getpid(), signal.SIGTERM)


def _put_all(values: list[tuple[asyncio.Queue, Any]]) -> None:
    for queue, value in values:
        queue.put_nowait(value)
