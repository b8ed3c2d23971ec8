"""`castalia series check`: from the members of a series to a report of each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from castalia.bars import Advance, unseen
from castalia.checkpoint.sampled_values import middle
from castalia.config.tensor_table import block_of
from castalia.errors import CheckpointError
from castalia.series.audit import Series, StepReport, check_completeness, check_headers
from castalia.series.continuity import Readings, judge
from castalia.series.members import Member, holds, parse_steps
from castalia.series.moments import judge_states, state_at
from castalia.series.resuming import identity_of, one_thread_each, work_through
from castalia.series.states import StateReading, read_states
from castalia.series.tensor_pass import MOST, Apart, TensorReading, read_column
from castalia.storage.lazy import TensorRef

STATE = " state"  # ends the names of parts of the work that read optimizer states


@dataclass
class Checkup:
    """What was found of a series."""

    reports: list[StepReport]
    unknown: list[str]  # what could not be judged, and why
    movement: dict[str, list[tuple[int, float]]]  # by layer: (step, RMS of the movement since the step before)

    @property
    def is_fine(self) -> bool:
        """Whether nothing is wrong with any step."""
        return all(report.worst is None for report in self.reports)


def check_series(
    members: Sequence[Member],
    *,
    against: str | None = None,
    quick: bool = False,
    run: Path | None = None,
    steps: str | None = None,
    jobs: int = 1,
    advance: Advance = unseen,
) -> Checkup:
    """Check the members of a series, which `steps` has chosen.

    `against`: a config or a run that they are held against. `quick`: read headers and a sample of the weights only.
    `run`: the run's folder, whose record tells which steps were saved. Raises CastaliaError for an unreadable
    config.
    """
    series = Series(members, against)
    check_headers(series)
    if quick:
        readings: Readings = {name: _quick_column(series, name) for name in series.names}
        series.unknown += ["what a sample does not show: checksums, single values, equal bytes; leave out --quick"]
        series.unknown += ["optimizer states: leave out --quick"]
    else:
        readings, states = _read_all(series, members, jobs, advance)
    judge(series, readings, quick)
    if not quick:
        judge_states(series, states)
    ranges = parse_steps(steps) if steps else None
    check_completeness(series, run, lambda step: ranges is None or holds(ranges, step))
    return Checkup(series.report(), series.unknown, _movement(series, readings))


def _read_all(
    series: Series, members: Sequence[Member], jobs: int, advance: Advance
) -> tuple[Readings, dict[str, list[StateReading]]]:
    """Read all tensors of all steps, once."""
    stateful = [name for name in series.names if any(state_at(entry, name) for entry in series.entries)]
    parts = [*series.names, *(name + STATE for name in stateful)]

    def work(part: str) -> list[dict]:
        """One tensor, or its optimizer state."""
        name = part.removesuffix(STATE)
        if part.endswith(STATE):
            return [reading.as_json() for reading in read_states([state_at(entry, name) for entry in series.entries])]
        refs = [series.tensor(entry, name) for entry in series.entries]
        return [reading.as_json() for reading in read_column(name, refs, len(series.names))]

    identity = identity_of(members, "check", 1)
    with one_thread_each(jobs):
        by_part = work_through(parts, work, identity, jobs=jobs, advance=advance)
    readings = {name: [TensorReading.of_json(each) for each in by_part[name]] for name in series.names}
    return readings, {name: [StateReading(**each) for each in by_part[name + STATE]] for name in stateful}


def _quick_column(series: Series, name: str) -> list[TensorReading]:
    """What a sample of each step's tensor shows, in the order in which it is stored."""
    if len({entry.checkpoint.format for entry in series.readable if entry.checkpoint}) > 1:
        raise CheckpointError("--quick compares values as they are stored, and these steps have several formats")
    readings: list[TensorReading] = []
    before: TensorReading | None = None
    for entry in series.entries:
        readings.append(_quick(series.tensor(entry, name), before))
        before = before if readings[-1].error else readings[-1]
    return readings


def _quick(ref: TensorRef | None, before: TensorReading | None) -> TensorReading:
    if ref is None:
        return TensorReading(error="is not there")
    try:
        values = middle(ref, MOST)
    except (CheckpointError, OSError) as error:
        return TensorReading(error=str(error))
    wide, count = values.astype(np.float64), int(np.prod(ref.shape))
    scale = count / max(1, len(values))
    reading = TensorReading(
        digest=values.tobytes().hex(),
        count=count,
        not_finite=int((~np.isfinite(values)).sum()),
        zeros=count if not values.any() else int((values == 0).sum()),
        squares=float(wide @ wide) * scale,
        largest=float(np.abs(wide).max(initial=0.0)),
        sample=values,
    )
    if before is not None and len(before.sample) == len(values):
        difference = wide - before.sample
        largest = float(np.abs(difference).max(initial=0.0))
        reading.previous = Apart(0.5 * float(difference @ difference) * scale, float(wide @ before.sample), largest)
    return reading


def layer_of(name: str) -> str:
    """The block of a tensor, or the part of the model outside of the blocks."""
    return f"block {block_of(name)}" if name.startswith("blocks.") else name.partition(".")[0]


def _movement(series: Series, readings: Readings) -> dict[str, list[tuple[int, float]]]:
    """The RMS of each layer's movement from step to step."""
    found: dict[str, list[tuple[int, float]]] = {}
    for index, entry in enumerate(series.entries):
        sums: dict[str, list[float]] = {}
        for name, column in readings.items():
            reading = column[index] if index < len(column) else None
            if reading and reading.previous and not reading.error:
                total = sums.setdefault(layer_of(name), [0.0, 0.0])
                total[0] += reading.previous.squares
                total[1] += reading.count
        for layer, (squares, count) in sums.items():
            found.setdefault(layer, []).append((entry.member.step, float(np.sqrt(squares / max(count, 1)))))
    return found
