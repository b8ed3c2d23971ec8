"""The thread that computes: what it lets go of, and how it ends."""

from __future__ import annotations

import signal
import threading
import weakref
from concurrent.futures import CancelledError
from typing import Any

import pytest

from castalia.errors import CastaliaError, CheckpointError
from castalia.serve import worker as worker_module
from castalia.serve.worker import Worker


class Counting:
    """In place of an engine: a number of steps."""

    def __init__(self, steps: int, error: Exception | None = None) -> None:
        self.left, self.error, self.failed = steps, error, list[str]()
        self.done = threading.Event()

    @property
    def busy(self) -> bool:
        return self.left > 0

    def step(self) -> None:
        self.left -= 1
        if self.error:
            raise self.error
        if not self.left:
            self.done.set()

    def fail(self, message: str) -> None:
        self.failed.append(message)
        self.done.set()


def finish(worker: Worker, engine: Any) -> None:
    worker.engines = [engine]
    worker.wake()
    assert engine.done.wait(10)
    worker.call(lambda: None).result(10)  # the round with the last step is over


def test_a_model_that_is_dropped_gives_its_memory_back_at_once() -> None:
    """Not only when another one is asked: until then both would be in memory."""
    worker, engine = Worker(), Counting(2)
    gone = threading.Event()
    weakref.finalize(engine, gone.set)
    finish(worker, engine)
    worker.engines = []
    del engine
    assert gone.wait(5)
    worker.stop()


def test_an_error_with_words_for_people_is_told(caplog: pytest.LogCaptureFixture) -> None:
    worker, engine = Worker(), Counting(1, CheckpointError("block 3 is damaged"))
    finish(worker, engine)
    assert engine.failed == ["block 3 is damaged"] and not caplog.records
    worker.stop()


def test_the_end_leaves_nobody_waiting() -> None:
    worker, begun, goes_on = Worker(), threading.Event(), threading.Event()
    running = worker.call(lambda: (begun.set(), goes_on.wait(10)))
    assert begun.wait(10)
    waiting = worker.call(lambda: None)
    ending = threading.Thread(target=worker.stop)
    ending.start()
    while not worker.stopped:
        pass
    goes_on.set()
    ending.join(10)
    assert running.done()
    with pytest.raises(CancelledError):
        waiting.result(10)


def test_other_processes_hear_of_a_server_without_work_and_their_loss_ends_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They wait for its next step for ten minutes, and fail if they hear nothing."""
    monkeypatch.setattr(worker_module, "SIGN_SECONDS", 0.02)
    signs, asked, gone = threading.Semaphore(0), threading.Event(), threading.Event()

    def sign() -> None:
        signs.release()
        if gone.is_set():
            raise ConnectionError("closed by a peer")

    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        worker = Worker(sign)
        assert all(signs.acquire(timeout=10) for _ in range(3)) and worker.lost is None
        gone.set()
        assert asked.wait(10)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "ConnectionError" in str(worker.lost) and "it ends" in caplog.text
    engine = Counting(5)
    worker.engines = [engine]
    worker.wake()
    assert engine.done.wait(10)
    assert set(engine.failed) == {worker.lost} and engine.left == 5
    engine.left = 0
    with pytest.raises(CastaliaError, match="have lost each other"):
        worker.call(lambda: None).result(10)
    worker.stop()
