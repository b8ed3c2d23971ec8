"""The records of a run: metrics.jsonl with one object per step, events.jsonl, and optional sinks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from castalia.config.schema import LARGEST, RunConfig
from castalia.files import sync, write_text
from castalia.observe.sinks import open_sinks
from castalia.reading import keys, plain_json, read_records
from castalia.strict_json import to_json

NUMBERS = ("loss", "valid_loss", "grad_norm", "lr", "seconds", "tokens_per_second")
Step = Annotated[int, Field(ge=0, le=LARGEST)]
METRIC = keys({"step": Step, "tokens": int | None, **dict.fromkeys(NUMBERS, float | None)}, required=["step"])
EVENT = keys({"event": str, "step": Step, "back_to": Step, "action": str}, required=["event"])
NOTED = b" "  # ends an unfinished record; finished ones have no space after a value


class Metrics:
    """Appends one line to metrics.jsonl for each step and flushes it. Nothing that was written is ever changed.

    A step that is due for evaluation is first noted as a line without its end; the results of the evaluation complete
    it. `noted` is such a record of an earlier start, as `truncate_metrics` returns it.
    """

    def __init__(self, folder: Path, config: RunConfig, noted: Mapping[str, Any] | None = None):
        self.folder, self.noted = folder, noted
        self.file = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 - open as long as the run
        past = list(read_metrics(folder))
        self.sinks = open_sinks(config, folder, past[:-1] if noted else past)

    def note(self, record: Mapping[str, Any]) -> None:
        """Writes an unfinished record, which `write` completes."""
        self.noted = record
        self.file.write(as_noted(record))
        self.file.flush()

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes a step's record, or completes the one that was noted, and passes it to all sinks."""
        # The complete record begins with the noted one, so only the rest has to be appended.
        begun = as_noted(self.noted).removesuffix(NOTED.decode()) if self.noted else ""
        self.noted = None
        self.file.write(as_line(record).removeprefix(begun))
        for sink in self.sinks:
            sink.write(record)

    def sync(self) -> None:
        """Waits until all records are on disk, as they must be before the checkpoint of the same step."""
        for path in self.folder.glob("*.jsonl"):
            sync(path)

    def close(self) -> None:
        """Closes the file and all sinks."""
        self.file.close()
        for sink in self.sinks:
            sink.close()


def write_event(folder: Path, event: str, **facts: Any) -> None:
    """Appends an event, with the time and its facts, to events.jsonl."""
    with open(folder / "events.jsonl", "a") as file:
        file.write(as_line({"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts}))


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of metrics.jsonl in order, without a last line that a killed process left unfinished."""
    return _read(folder / "metrics.jsonl", METRIC)


def read_last_metrics(folder: Path, count: int) -> list[dict[str, Any]]:
    """The last `count` records, without reading those before them."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    with open(path, "rb") as file:
        # Read ever larger pieces of the end until they hold enough lines.
        size, taken = file.seek(0, os.SEEK_END), 0
        lines: list[bytes] = []
        while len(lines) <= count and taken < size:
            taken = min(size, 2 * taken or 1 << 16)
            file.seek(size - taken)
            lines = file.read(taken).splitlines(keepends=True)
    whole = lines[taken < size :]  # the first one may be cut
    return list(read_records(map(_finished, whole), "metrics.jsonl, near its end", METRIC))[-count:]


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """The events of a run in order."""
    return _read(folder / "events.jsonl", EVENT)


def _read(path: Path, shape: Any) -> Iterator[dict[str, Any]]:
    """Reads records; a damaged line is reported and left out, because no run should end for its records."""
    if path.exists():
        with open(path, "rb") as file:
            yield from read_records(map(_finished, file), str(path), shape)


def _finished(line: bytes) -> bytes:
    """Completes a line that `note` wrote, also if a part of its end is there. Other lines are returned as they are."""
    if line.endswith(b"\n"):
        return line
    # What completes a record follows the mark with a comma; where that is cut off, the record before it is kept.
    begun, mark, _ = line.partition(NOTED + b",") if NOTED + b"," in line else line.rpartition(NOTED)
    try:
        plain_json(begun + b"}")
    except ValueError:  # a killed process left it unfinished
        return line
    return begun + b"}\n" if mark else line


def truncate_metrics(folder: Path, step: int, evaluates: bool) -> dict[str, Any] | None:
    """Drops the records after `step`, which the resumed run writes again, and unfinished ones.

    `evaluates` says whether `step` is due for evaluation. If its results are missing, its record is returned, and stays
    in the file as a noted one.
    """
    records = [record for record in read_metrics(folder) if record["step"] <= step]
    is_noted = evaluates and records[-1:] != [] and records[-1]["step"] == step and "valid_loss" not in records[-1]
    noted = records.pop() if is_noted else None
    write_text(folder / "metrics.jsonl", "".join(map(as_line, records)) + (as_noted(noted) if noted else ""))
    return noted


def truncate_records(path: Path, step: int | None = None) -> None:
    """Drops the records after `step` (None: keeps all) and an unfinished last line."""
    if path.exists():
        records = _read(path, EVENT if step is None else METRIC)
        kept = (record for record in records if step is None or record["step"] <= step)
        write_text(path, "".join(map(as_line, kept)))


def as_line(record: Mapping[str, Any]) -> str:
    """A record as a line of JSON."""
    return to_json(record) + "\n"  # infinite values, as an overflow's gradient norm, become null


def as_noted(record: Mapping[str, Any]) -> str:
    """A record as the line that `note` writes, which lacks its end."""
    return as_line(record).removesuffix("}\n") + NOTED.decode()
