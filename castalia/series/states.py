"""The optimizer state of one tensor at all steps of a series: is it there, is it of these weights, does it go on.

For Adam two things hold for whatever gradients, element by element: |m| <= c sqrt(v), as in `castalia.series.travel`,
and v at a step is at least b2^n times what it was n updates before. Moments of another run break both.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from castalia.checkpoint.rules import MOMENTS
from castalia.errors import CheckpointError
from castalia.series.tensor_pass import pieces_of
from castalia.storage.extent import verifying
from castalia.storage.lazy import TensorRef, as_bytes, same_bits

TOLERANCE = 1e-3  # relative, for rounding in the optimizer's own arithmetic
FORGOTTEN = 1e-3  # share of the second moment that is left after so many updates: below it shows nothing


@dataclass(frozen=True)
class StateAt:
    """One tensor's optimizer state at a step, and what it is judged by."""

    tensors: Mapping[str, TensorRef]  # by kind
    weight: TensorRef | None
    step: int  # the optimizer's own
    skipped: int
    betas: tuple[float, float]
    gradient_factor: int = 1  # moments are those of gradients times this


@dataclass
class StateReading:
    """What one pass over a tensor's optimizer state finds."""

    error: str = ""
    digests: dict[str, str] = field(default_factory=dict)  # by kind
    count: int = 0
    zeros: dict[str, int] = field(default_factory=dict)
    beyond: int = 0  # elements whose first moment is larger than the second allows
    shrunk: int | None = None  # elements whose second moment is smaller than the step before allows; None: not judged
    shrunk_past: int | None = None  # than the step before that one allows
    unrounded: int = 0  # weights that are not their masters rounded

    def as_json(self) -> dict[str, Any]:
        """Values of JSON."""
        return asdict(self)


def read_states(states: Sequence[StateAt | None]) -> list[StateReading]:
    """A reading of each step's state of one tensor, a piece at a time as `read_column` does; None: there is none."""
    readings = [StateReading() for _ in states]
    shapes = {tuple(ref.shape) for state in states if state for kind, ref in _aligned(state)}
    marks: list[dict[str, Any]] = [{} for _ in states]
    with ExitStack() as deferred:
        for reading, state in zip(readings, states, strict=True):
            deferred.enter_context(_told(reading, state.tensors.values() if state else ()))
        for shape in shapes:  # mostly one
            for _, rows in pieces_of(shape):
                before: list[tuple[StateAt, torch.Tensor]] = []  # the last two steps
                for reading, state, mark in zip(readings, states, marks, strict=True):
                    if state and not reading.error:
                        before += _read(reading, state, mark, shape, rows, before)
                        before = before[-2:]
    for reading, mark in zip(readings, marks, strict=True):
        reading.digests = {kind: each.hexdigest() for kind, each in mark.items()}
    return readings


def _aligned(state: StateAt) -> list[tuple[str, TensorRef]]:
    """What is read: the moments of whatever optimizer, and masters that are not the weights themselves."""
    return [(kind, ref) for kind, ref in state.tensors.items() if kind != "master" or ref is not state.weight]


def _read(
    reading: StateReading,
    state: StateAt,
    marks: dict[str, Any],
    shape: tuple[int, ...],
    rows: list[slice],
    before: Sequence[tuple[StateAt, torch.Tensor]],
) -> list[tuple[StateAt, torch.Tensor]]:
    """Read a piece of a step's state. Returns the second moment there, if any, by which the next steps are judged."""
    try:
        held = {kind: ref.read(rows) for kind, ref in _aligned(state) if tuple(ref.shape) == shape}
        master = held.pop("master", None)
        if master is not None and state.weight is not None:
            weight = state.weight.read(rows)
            rounded = master.to(weight.dtype)
            reading.unrounded += 0 if same_bits(rounded, weight) else int((rounded != weight).sum())
    except CheckpointError as error:
        reading.error = str(error)
        return []
    for kind, values in held.items():
        marks.setdefault(kind, hashlib.sha256()).update(as_bytes(values))
        zeros = values.numel() - int(torch.count_nonzero(values))
        reading.zeros[kind] = reading.zeros.get(kind, 0) + zeros
    if not set(MOMENTS) <= held.keys():
        reading.count += max((values.numel() for values in held.values()), default=0)
        return []
    first, second = (held[kind].float() for kind in MOMENTS)
    reading.count += first.numel()
    limit = first_moment_factor(*state.betas) * (1 + TOLERANCE)
    reading.beyond += int((first.abs() > second.sqrt() * limit + 1e-18).sum())
    for (at, past), field_name in zip(reversed(before), ("shrunk", "shrunk_past"), strict=False):
        kept = _kept(at, state)
        if kept > FORGOTTEN and past.shape == second.shape:
            fewer = int((second < past * (kept * (1 - TOLERANCE)) - 1e-36).sum())
            setattr(reading, field_name, (getattr(reading, field_name) or 0) + fewer)
    return [(state, second)]


def _kept(before: StateAt, state: StateAt) -> float:
    """The share of the second moment before that must be left; 0 where one does not follow from the other."""
    updates = state.step - before.step
    if updates <= 0 or state.skipped != before.skipped or state.gradient_factor != before.gradient_factor:
        return 0.0  # begun anew, or perhaps rewound to an earlier step
    return min(state.betas[1], before.betas[1]) ** updates


def first_moment_factor(first: float, second: float) -> float:
    """c of |m| <= c sqrt(v), for any number of updates; infinite if the first moment remembers for longer."""
    ratio = first * first / second
    return (1 - first) / math.sqrt((1 - second) * (1 - ratio)) if ratio < 1 else math.inf


class _told:
    """`verifying`, of which damage is told in the reading instead of raised."""

    def __init__(self, reading: StateReading, refs: Iterable[TensorRef]) -> None:
        self.reading, self.inner = reading, verifying(list(refs))

    def __enter__(self) -> None:
        self.inner.__enter__()

    def __exit__(self, *raised: Any) -> None:
        try:
            self.inner.__exit__(*raised)
        except CheckpointError as error:
            self.reading.error = self.reading.error or str(error)
