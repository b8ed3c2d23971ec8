"""The state of runs, read from their folders. Nothing here disturbs a run that is training."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from castalia.checkpoint.formats.native.read import saved_steps
from castalia.checkpoint.formats.native.save import in_use
from castalia.config.load import load_config
from castalia.errors import DataError
from castalia.observe.metrics import read_events, read_last_metrics
from castalia.train.run_folder import is_run

State = Literal["starting", "training", "complete", "stopped", "failed", "died"]
RECENT = 20  # steps whose median gives the pace
NOTABLE = ("spike", "slow", "rewind", "error")  # events that a status counts


@dataclass(frozen=True)
class RunStatus:
    """The state of one run. What is not known yet is None."""

    folder: str
    state: State
    by: str | None  # the process and host that hold the folder
    step: int
    steps: int | None
    loss: float | None
    valid_loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None  # at the pace of the last steps, of a run that is training
    saved_step: int | None
    saved_seconds_ago: float | None
    seconds_ago: float | None  # of the last step
    events: Mapping[str, int]  # what went wrong since the run began, by kind
    message: str | None  # why it failed


def find_runs(path: str | Path) -> list[Path]:
    """The run in a folder, or all runs below it. Raises DataError where there is none."""
    folder = Path(path)
    if is_run(folder) and (folder / "events.jsonl").is_file():
        return [folder]
    below = sorted(events.parent for events in folder.rglob("events.jsonl") if is_run(events.parent))
    if not below:
        raise DataError(f"{path} holds no run, and none lies below it: a run has config.yml and events.jsonl")
    return below


def read_status(folder: Path) -> RunStatus:
    """The state of the run in a folder."""
    events, last = list(read_events(folder)), read_last_metrics(folder, RECENT)
    by = in_use(folder / "checkpoints")
    steps = load_config(folder, any_batch=True).train.steps
    step = last[-1]["step"] if last else 0
    saved = saved_steps(folder / "checkpoints")
    newest = max(saved, default=None)
    state = _state(by, events, bool(last))
    pace, rate = _median(last, "seconds"), _median(last, "tokens_per_second")
    valid = next((event.get("loss") for event in reversed(events) if event["event"] == "evaluation"), None)
    return RunStatus(
        folder=os.fspath(folder),
        state=state,
        by=by,
        step=step,
        steps=steps,
        loss=last[-1].get("loss") if last else None,
        valid_loss=valid,
        tokens_per_second=rate,
        seconds_left=pace * (steps - step) if state == "training" and pace and steps else None,
        saved_step=newest,
        saved_seconds_ago=None if newest is None else _age(saved[newest]),
        seconds_ago=_age(folder / "metrics.jsonl"),
        events=dict(Counter(event["event"] for event in events if event["event"] in NOTABLE)),
        message=events[-1].get("message") if state == "failed" else None,
    )


def _median(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The median of a value that not every record has: an infinite loss, for example, is written as null."""
    known = [record[name] for record in records if record.get(name) is not None]
    return median(known) if known else None


def _state(by: str | None, events: Sequence[Mapping[str, Any]], has_steps: bool) -> State:
    if by is not None:
        return "training" if has_steps else "starting"
    ends: dict[str, State] = {"end": "complete", "stop": "stopped", "error": "failed"}
    return ends.get(events[-1]["event"] if events else "", "died")


def _age(path: Path) -> float | None:
    return max(0.0, time.time() - path.stat().st_mtime) if path.exists() else None
