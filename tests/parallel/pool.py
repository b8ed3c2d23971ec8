"""Eight gloo workers that live as long as the test session. Each task joins a group of its first `world` workers."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZE = 8


class Pool:
    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.results = context.Queue()
        self.queues = [context.Queue() for _ in range(SIZE)]
        self.workers = [
            context.Process(target=_work, args=(rank, self.store.port, queue, self.results), daemon=True)
            for rank, queue in enumerate(self.queues)
        ]
        for worker in self.workers:
            worker.start()
        self.tasks = 0

    def run(self, task: Callable[..., Any], world: int, *args: Any) -> list[Any]:
        """What `task(*args)` returned on each of `world` ranks. Raises AssertionError with the tracebacks of failures."""
        self.tasks += 1
        for queue in self.queues[:world]:
            queue.put((self.tasks, world, task, args))
        answers = dict(self.results.get(timeout=120)[1:] for _ in range(world))
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in sorted(answers.items()) if not ok]
        assert not failures, "\n".join(failures)
        return [answers[rank][1] for rank in range(world)]

    def close(self) -> None:
        for queue in self.queues:
            queue.put(None)
        for worker in self.workers:
            worker.join(10)
            worker.kill()


def _work(rank: int, port: int, queue: Any, results: Any) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port)
    while (job := queue.get()) is not None:
        number, world, task, args = job
        try:
            group = dist.PrefixStore(f"task{number}", store)
            dist.init_process_group("gloo", store=group, rank=rank, world_size=world, timeout=timedelta(seconds=60))
            answer = True, task(*args)
        except BaseException:  # noqa: BLE001 - whatever it is, the test shows it
            answer = False, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        results.put((number, rank, answer))
