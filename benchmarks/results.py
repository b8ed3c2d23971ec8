"""What a benchmark measured, a line of JSON for each row, with the state of the machine beside it.

Each benchmark takes `--json FILE` and adds its lines to that file, so that old and new code that run in turns, each
with a file of its own, have several lines for each row. `compare.py` puts two such files beside each other.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from castalia.machine import processor_name

BUSY = 0.1  # of one core that other programs took while a row was measured
file: Path | None = None  # that rows are added to


class Spent(NamedTuple):
    """Seconds of processors since the machine started: of all programs, and of this one with its children."""

    clock: float
    everyone: float
    own: float


def option(parser: argparse.ArgumentParser) -> None:
    """Gives a benchmark its `--json FILE`."""

    class Keep(argparse.Action):
        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
            global file
            file = Path(values)

    parser.add_argument("--json", action=Keep, metavar="FILE", help="add each row to this file, for compare.py")


def record(row: str, seconds: Sequence[float], clock: str = "wall") -> None:
    """Adds what the rounds of a row took, if it was asked for. `clock`: "wall" or "cpu"."""
    global _before
    now, before = _spent(), _before
    _before = now
    if file is None:
        return
    others = None
    if now and before and now.clock > before.clock:
        others = max(0.0, now.everyone - before.everyone - now.own + before.own) / (now.clock - before.clock)
    line = {
        "benchmark": Path(sys.argv[0]).stem,
        "row": row,
        "seconds": [round(value, 9) for value in seconds],
        "clock": clock,
        "threads": _threads(),
        "machine": _machine(),
        "load": round(os.getloadavg()[0], 2),
        "others_cores": None if others is None else round(others, 2),
        "busy": None if others is None else others > BUSY,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "command": " ".join(sys.argv),
    }
    with file.open("a") as lines:
        lines.write(json.dumps(line) + "\n")


def _machine() -> str:
    return f"{os.cpu_count()} x {processor_name()}, Python {platform.python_version()}"


def _threads() -> int:
    return sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 1


def _spent() -> Spent | None:
    """None where the system does not tell."""
    if not Path("/proc/stat").exists():
        return None
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split(None, 8)[1:8])
    own, group = 0, os.getpgrp()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # from the state on, the third field
        except OSError:  # it has ended
            continue
        if int(fields[2]) == group:
            own += sum(map(int, fields[11:15]))  # user and system, of the process and of its children that ended
    return Spent(time.monotonic(), (user + nice + system + irq + softirq) / tick, own / tick)


_before = _spent()
