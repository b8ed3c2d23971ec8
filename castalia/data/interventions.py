"""Changes to single rows of named steps: other ids, parts that the loss leaves out, or another weight in the loss. A
file with a row on each line:

    {"step": 120, "row": 3, "ids": [17, 4, ...]}          in place of what the order of the data has there
    {"step": 121, "row": 0, "mask": true}                 no loss on the row
    {"step": 121, "row": 5, "mask": [[10, 20]]}           none on its ids 10 to 19
    {"step": 121, "row": 6, "weight": 2.5}                its losses times 2.5; the sum is divided by as many tokens

Steps are counted from 1, rows and ids from 0. `castalia data batch --output rows.jsonl` writes such rows; what else is
in them is not read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from castalia.data.sample_index import IGNORE
from castalia.errors import DataError
from castalia.reading import keys, parse_json, read_bytes

LINE = keys(
    {"step": int, "row": int, "ids": list[int], "mask": bool | list[list[int]], "weight": float},
    required=("step", "row"),
)


@dataclass(frozen=True)
class Intervention:
    """What one row is trained on instead."""

    ids: tuple[int, ...] | None  # with the one after the last input; None: those of the data
    mask: tuple[tuple[int, int], ...]  # ids [start, stop) that the loss leaves out
    weight: float = field(default=1.0, repr=False)  # of the row's losses; below 0: away from the row

    @property
    def kind(self) -> str:
        """A word for people."""
        if self.ids is None and not self.mask:
            return f"weighted {self.weight:g}"
        return "replaced" if self.ids is not None else "masked"

    def apply(self, text: np.ndarray, labels: np.ndarray) -> None:
        """Change a row's ids and its labels before they are shifted, both [length], in place."""
        if self.ids is not None:
            given = self.ids[: len(text)]
            text[:], labels[:] = 0, IGNORE  # ids that end early are filled up, as all sequences are
            text[: len(given)] = labels[: len(given)] = given
        for start, stop in self.mask:  # last, so that ids that were replaced can be masked, too
            labels[start:stop] = IGNORE


@dataclass(frozen=True, eq=False)
class Interventions:
    """All interventions of a run."""

    path: str
    rows: Mapping[tuple[int, int], Intervention]  # by step and row, both from 0

    def digest(self, until: int | None) -> str:
        """A digest of those of the first `until` steps; empty if there are none, so that it changes nothing."""
        # Sorted: in which order the file lists them changes nothing in the training.
        rows = sorted((place, each) for place, each in self.rows.items() if until is None or place[0] < until)
        changes = [(*row, row[1].weight) if row[1].weight != 1.0 else row for row in rows]
        return hashlib.blake2b(repr(changes).encode(), digest_size=16).hexdigest() if changes else ""


def read_interventions(path: str, most_ids: int) -> Interventions:
    """The interventions of a file. `most_ids`: a sequence and one id more. Raises DataError for a line that is none."""
    rows: dict[tuple[int, int], Intervention] = {}
    for number, line in enumerate(read_bytes(Path(path), DataError).splitlines(), start=1):
        if line.strip():
            where = f"{path}:{number}"
            place, change = _parsed(parse_json(line, where, DataError, LINE), where, most_ids)
            if place in rows:
                raise DataError(f"{where}: step {place[0] + 1}, row {place[1]} is already changed; keep one line")
            rows[place] = change
    return Interventions(path, rows)


def _parsed(line: dict[str, Any], where: str, most_ids: int) -> tuple[tuple[int, int], Intervention]:
    step, row, ids, mask = line["step"], line["row"], line.get("ids"), line.get("mask", False)
    if step < 1 or row < 0:
        raise DataError(f"{where}: step={step}, row={row}: steps are counted from 1, rows from 0")
    if ids is None and not mask and "weight" not in line:
        raise DataError(
            f"{where}: give ids, which replace the row, mask: true or ranges [[start, stop]], or the weight of its loss"
        )
    if not math.isfinite(weight := float(line.get("weight", 1.0))):
        raise DataError(f"{where}: weight={weight} is not a finite number")
    if ids is not None and not 2 <= len(ids) <= most_ids:
        raise DataError(f"{where}: {len(ids)} ids; a row has 2 to {most_ids}, data.seq_length and one more")
    ranges = [[0, most_ids]] if mask is True else mask or []
    if any(len(pair) != 2 or not 0 <= pair[0] < pair[1] <= most_ids for pair in ranges):
        raise DataError(f"{where}: mask: ranges are [start, stop] within 0 and {most_ids}")
    spans = tuple((start, stop) for start, stop in ranges)
    return (step - 1, row), Intervention(tuple(ids) if ids is not None else None, spans, weight)
