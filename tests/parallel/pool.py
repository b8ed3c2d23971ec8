"""Eight gloo workers that live as long as the test session. Each task joins a group of its first `world` workers."""

from __future__ import annotations

import gc
import os
import queue
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import _lru_cache_wrapper
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

SIZE = 8
TIMEOUT_S = 120.0


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
        if not self.workers:
            self._start()
        self.tasks += 1
        for inbox in self.queues[:world]:
            inbox.put((self.tasks, world, task, args))
        answers: dict[int, tuple[Any, str | None]] = {}
        try:
            while len(answers) < world:
                rank, result, failure = self.results.get(timeout=TIMEOUT_S)
                answers[rank] = result, failure
        except queue.Empty:
            pass
        missing = set(range(world)) - set(answers)
        failures = [f"rank {rank}:\n{failure}" for rank, (_, failure) in sorted(answers.items()) if failure]
        failures += [f"rank {rank}: no answer within {TIMEOUT_S:g} s" for rank in missing]
        if missing:
            self.close()
        errors = [result for result, failure in answers.values() if failure]
        if len(errors) == world and len({repr(error) for error in errors}) == 1:
            raise errors[0]
        assert not failures, "\n".join(failures)
        return [answers[rank][0] for rank in range(world)]

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
    store = dist.TCPStore("127.0.0.1", port)
    while (job := inbox.get()) is not None:
        number, world, task, args = job
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
        result, failure = None, None
        try:
            group = dist.PrefixStore(f"task{number}", store)
            dist.init_process_group("gloo", store=group, rank=rank, world_size=world, timeout=timedelta(seconds=60))
            result = task(*args)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test shows it
            result, failure = error, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            _forget_meshes()
        results.put((rank, result, failure))


def _forget_meshes() -> None:
    """DTensor remembers redistributions by mesh, and a later task's mesh equals that of a group that is gone."""
    _clear_sharding_prop_cache()
    for value in gc.get_objects():
        if isinstance(value, _lru_cache_wrapper) and value.__module__.startswith("torch.distributed"):
            value.cache_clear()
