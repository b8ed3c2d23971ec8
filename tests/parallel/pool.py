"""Eight gloo workers that live as long as the test session. Each task joins a group of its first `world` workers."""

from __future__ import annotations

import gc
import os
import pickle
import queue
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import _lru_cache_wrapper
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor._redistribute import clear_redistribute_planner_cache
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

SIZE = 8
MEET_S = 240.0  # what ranks wait for each other: on a machine with other work seconds become minutes
TIMEOUT_S = 600.0


class Pool:
    """Workers are started when the first task needs them, and again after a task that left some of them hanging."""

    def __init__(self) -> None:
        self.context = mp.get_context("spawn")
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.queues: list[Any] = []
        self.workers: list[Any] = []
        self.tasks = 0

    def run(self, task: Callable[..., Any], world: int, *args: Any) -> list[Any]:
        """What `task(*args)` returned on each of `world` ranks.

        Raises the ranks' error where all raised the same, else AssertionError with the tracebacks of those that failed.
        """
        if torch.__version__ < "2.12" and any("'zero-bubble'" in repr(arg) for arg in args):
            pytest.skip("zero-bubble schedules are refused under torch 2.11")
        if not self.workers:
            self._start()
        self.tasks += 1
        job = pickle.dumps((task, args))
        for inbox in self.queues[:world]:
            inbox.put((self.tasks, world, job))
        answers = self._answers(world)
        missing = set(range(world)) - set(answers)
        failures = [f"rank {rank}:\n{failure}" for rank, (_, failure) in sorted(answers.items()) if failure]
        failures += [f"rank {rank}: no answer, exit code {self.workers[rank].exitcode}" for rank in missing]
        if missing:
            self.close()
        errors = [result for result, failure in answers.values() if failure]
        if len(errors) == world and len({repr(error) for error in errors}) == 1:
            raise errors[0]
        assert not failures, "\n".join(failures)
        return [answers[rank][0] for rank in range(world)]

    def _answers(self, world: int) -> dict[int, tuple[Any, str | None]]:
        """Result and failure of each rank that answers: all of them, unless one dies or time runs out."""
        answers: dict[int, tuple[Any, str | None]] = {}
        end = time.monotonic() + TIMEOUT_S
        while len(answers) < world and time.monotonic() < end:
            try:
                rank, result, failure = pickle.loads(self.results.get(timeout=1.0))
                answers[rank] = result, failure
            except queue.Empty:
                if not all(worker.is_alive() for worker in self.workers[:world]):
                    break
        return answers

    def _start(self) -> None:
        self.results = self.context.Queue()
        self.queues = [self.context.Queue() for _ in range(SIZE)]
        self.workers = [
            self.context.Process(target=_work, args=(rank, self.store.port, inbox, self.results), daemon=True)
            for rank, inbox in enumerate(self.queues)
        ]
        for worker in self.workers:
            worker.start()

    def close(self) -> None:
        for inbox in self.queues:
            inbox.put(None)
        for worker in self.workers:
            worker.join(5)
            worker.kill()
        self.workers = []


def _work(rank: int, port: int, inbox: Any, results: Any) -> None:
    torch.set_num_threads(1)
    store, timeout = dist.TCPStore("127.0.0.1", port), timedelta(seconds=MEET_S)
    while (job := inbox.get()) is not None:
        number, world, call = job
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
        result, failure = None, None
        try:
            task, args = pickle.loads(call)
            group = dist.PrefixStore(f"task{number}", store)
            dist.init_process_group("gloo", store=group, rank=rank, world_size=world, timeout=timeout)
            dist.barrier()  # a task that fails at once must not leave while other ranks are still connecting
            result = task(*args)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test shows it
            result, failure = error, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            _forget_meshes()
        results.put(_packed(rank, result, failure))


def _packed(rank: int, result: Any, failure: str | None) -> bytes:
    try:
        return pickle.dumps((rank, result, failure))
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # which a queue would drop without a word
        return pickle.dumps((rank, RuntimeError(str(error)), failure or traceback.format_exc()))


def _forget_meshes() -> None:
    """DTensor remembers redistributions by mesh, and a later task's mesh equals that of a group that is gone.

    A group that is remembered lives on: gloo's threads wake a hundred times a second, and after some hundred tasks the
    machine does little else.
    """
    _clear_sharding_prop_cache()
    clear_redistribute_planner_cache()
    for value in gc.get_objects():
        # Not isinstance, which asks a weak proxy for the class of an object that may be gone.
        if type(value) is _lru_cache_wrapper and value.__module__.startswith("torch.distributed"):
            value.cache_clear()
    gc.collect()
