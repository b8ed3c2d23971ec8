"""Which of several ways to compute the same is the fastest on this machine: measured once, then remembered."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import blake2b

import torch

from castalia.errors import CastaliaError
from castalia.files import write_text
from castalia.machine import cache_folder, processor_name
from castalia.reading import keys, read_json

ROUNDS = 7  # of each way, in turns

Ways = Mapping[str, Callable[[], object]]


def fastest(task: str, ways: Callable[[], Ways]) -> str:
    """The name of the way that has the fastest round; `ways` is called only if nothing is known yet.

    What was found is kept in the user's cache, for this processor and torch: later processes take the same way and so
    get the same bits. All ways are measured in one thread, for on a busy machine several wait for each other.
    """
    machine = f"{processor_name()}, torch {torch.__version__}"
    name = blake2b(f"{task}, {machine}".encode(), digest_size=16).hexdigest()
    path = cache_folder() / "fastest" / f"{name}.json"
    with suppress(OSError, CastaliaError):  # whatever is missing or odd is measured anew
        return read_json(path, CastaliaError, keys({"fastest": str}, ["fastest"]))["fastest"]
    seconds = _measured(ways())
    found = min(seconds, key=seconds.__getitem__)
    with suppress(OSError):  # where a home cannot be written, each process measures
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"fastest": found, "task": task, "machine": machine, "seconds": seconds}
        write_text(path, json.dumps(record, indent=1) + "\n")
    return found


def _measured(ways: Ways) -> dict[str, float]:
    """Seconds of the fastest round of each way."""
    seconds, threads = dict.fromkeys(ways, float("inf")), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(ROUNDS):
            for name, run in ways.items():
                begin = time.perf_counter()
                run()
                seconds[name] = min(seconds[name], time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)
    return seconds
