"""The one thread in which all models compute, a step of each in turn."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from castalia.errors import CastaliaError, out_of_memory
from castalia.serve.engine import Engine

log = logging.getLogger("castalia.serve")


class Worker:
    """Runs the steps of engines, and functions between them."""

    def __init__(self) -> None:
        self.engines: list[Engine] = []
        self.calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self.change = threading.Condition()
        self.stopped = False
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
                self.change.wait()
            if self.stopped:
                return
            engines = [engine for engine in self.engines if engine.busy]
            call = self.calls.popleft() if self.calls else None
        if call is not None:
            _answer(*call)
        for engine in engines:
            _step(engine)


def _answer(function: Callable[[], Any], future: Future) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:  # whoever waits for the future gets it
        future.set_exception(error)


def _step(engine: Engine) -> None:
    try:
        engine.step()
    except Exception as error:  # the texts of this model end with it, those of others go on
        message = str(error) if isinstance(error, CastaliaError) else out_of_memory(error)
        if message is None:
            log.exception("a step failed")
        engine.fail(message or f"the server could not compute a step: {type(error).__name__}")
