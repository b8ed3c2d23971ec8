"""The record of a run: metrics.jsonl with one object a step, events.jsonl, and further sinks where asked for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from castalia.config.schema import RunConfig
from castalia.files import write_text
from castalia.reading import keys, read_records
from castalia.strict_json import to_json
from castalia.train.sinks import open_sinks

NUMBERS = ("loss", "valid_loss", "grad_norm", "lr", "tokens", "seconds")
METRIC = keys({"step": int, **dict.fromkeys(NUMBERS, float | None)}, required=["step"])
EVENT = keys({"event": str, "step": int, "back_to": int, "action": str}, required=["event"])


class Metrics:
    """Appends one line to metrics.jsonl for each step, written out at once.

    A step that is evaluated is noted before it is, and written with what the evaluation found. `incomplete`: the last
    one of an earlier start was noted only.
    """

    def __init__(self, folder: Path, config: RunConfig, incomplete: bool = False):
        past = list(read_metrics(folder))
        self.noted: int | None = None  # where the line begins that the next record of its step replaces
        self.file = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 - open as long as the run
        if incomplete:
            self.noted = self.file.tell() - len(as_line(past.pop()))
        self.sinks = open_sinks(config, folder, past)

    def note(self, record: Mapping[str, Any]) -> None:
        """Of a step whose record is not complete."""
        self.noted = self.file.tell()
        self.file.write(as_line(record))

    def write(self, record: Mapping[str, Any]) -> None:
        if self.noted is not None:
            self.file.truncate(self.noted)
            self.file.seek(self.noted)
            self.noted = None
        self.file.write(as_line(record))
        for sink in self.sinks:
            sink.write(record)

    def close(self) -> None:
        self.file.close()
        for sink in self.sinks:
            sink.close()


def write_event(folder: Path, event: str, **facts: Any) -> None:
    """Appends what happened, with the time, to events.jsonl."""
    with open(folder / "events.jsonl", "a") as file:
        file.write(as_line({"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts}))


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """The records in order. A last line that a killed process left unfinished is left out."""
    return _read(folder / "metrics.jsonl", METRIC)


def read_last_metrics(folder: Path, count: int) -> list[dict[str, Any]]:
    """The last records, without reading those before them."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    with open(path, "rb") as file:
        size, taken = file.seek(0, os.SEEK_END), 0
        lines: list[bytes] = []
        while len(lines) <= count and taken < size:
            taken = min(size, 2 * taken or 1 << 16)
            file.seek(size - taken)
            lines = file.read(taken).splitlines(keepends=True)
    whole = lines[taken < size :]  # the first one may be cut
    return list(read_records(whole, "metrics.jsonl, near its end", METRIC))[-count:]


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """What happened, in order."""
    return _read(folder / "events.jsonl", EVENT)


def _read(path: Path, shape: Any) -> Iterator[dict[str, Any]]:
    """A bad line is named and left out: a run does not end for its record."""
    if path.exists():
        with open(path, "rb") as file:
            yield from read_records(file, str(path), shape)


def truncate_metrics(folder: Path, step: int) -> None:
    """Drops the records after `step`: the resumed run writes them again."""
    kept = "".join(as_line(record) for record in read_metrics(folder) if record["step"] <= step)
    write_text(folder / "metrics.jsonl", kept)


def as_line(record: Mapping[str, Any]) -> str:
    return to_json(record) + "\n"  # a skipped step's gradient norm is null
