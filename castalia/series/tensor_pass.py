"""One tensor at all steps of a series, in one pass: a small piece of it at each step, then the next piece.

So every byte is read once, and memory holds a few pieces, whatever the size of the model and the number of steps:

    step 0    |== piece 0 ==|-- piece 1 --|-- ...
    step 1    |== piece 0 ==|-- piece 1 --|        figures of a piece, and of it against the step before and the first
    step 2    |== piece 0 ==|-- piece 1 --|
"""

from __future__ import annotations

import base64
import hashlib
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch

from castalia.errors import CheckpointError
from castalia.storage.extent import verifying
from castalia.storage.lazy import TensorRef, as_bytes

PIECE_ELEMENTS = 1 << 18  # 1 MiB in fp32, so that the pieces of a few steps fit into the processor's cache
SAMPLES = 1 << 16  # values of each step that are kept, over all tensors
FEWEST, MOST = 64, 1024  # of one tensor


@dataclass
class Apart:
    """How far a tensor is from the same tensor at another step."""

    squares: float = 0.0  # of the differences, summed
    product: float = 0.0  # of the two tensors
    largest: float = 0.0  # absolute difference

    def add(self, values: torch.Tensor, others: torch.Tensor) -> None:
        """Take in a piece of both: flat, fp32."""
        difference = values - others
        low, high = torch.aminmax(difference)
        self.squares += float(torch.dot(difference, difference))
        self.product += float(torch.dot(values, others))
        self.largest = max(self.largest, abs(float(low)), abs(float(high)))


@dataclass
class TensorReading:
    """What one pass over a tensor at one step finds. Sums are over finite and other values alike."""

    error: str = ""  # why it could not be read; the rest is then not known
    digest: str = ""  # of shape, dtype and values
    count: int = 0
    not_finite: int = 0
    zeros: int = 0
    total: float = 0.0
    squares: float = 0.0
    third: float = 0.0  # powers, summed
    fourth: float = 0.0
    largest: float = 0.0  # absolute value
    first: Apart | None = None  # against the first step that has it; None: it is the first
    previous: Apart | None = None
    last: Apart | None = None
    sample: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))  # values at fixed places

    @property
    def norm(self) -> float:
        """The root of the sum of squares."""
        return math.sqrt(self.squares)

    @property
    def mean(self) -> float:
        """Of all values."""
        return self.total / max(self.count, 1)

    @property
    def variance(self) -> float:
        """Of the population."""
        return max(self.squares / max(self.count, 1) - self.mean**2, 0.0)

    @property
    def kurtosis(self) -> float:
        """The fourth central moment over the squared variance: 3 for a normal distribution; NaN without variance."""
        if not self.variance:
            return math.nan
        mean, third, fourth = self.mean, self.third / self.count, self.fourth / self.count
        central = fourth - 4 * mean * third + 6 * mean**2 * (self.squares / self.count) - 3 * mean**4
        return central / self.variance**2

    def as_json(self) -> dict[str, Any]:
        """Values of JSON, from which `of_json` makes the same again."""
        sample = base64.b64encode(np.asarray(self.sample, "<f4").tobytes()).decode()
        return asdict(self) | {"sample": sample}

    @classmethod
    def of_json(cls, stored: dict[str, Any]) -> TensorReading:
        """The reading that `as_json` stored."""
        sample = np.frombuffer(base64.b64decode(stored["sample"]), "<f4")
        apart = {key: stored[key] and Apart(**stored[key]) for key in ("first", "previous", "last")}
        return cls(**{**stored, **apart, "sample": sample})


def read_column(
    name: str, refs: Sequence[TensorRef | None], num_tensors: int, last: bool = False
) -> list[TensorReading]:
    """A reading of each step's tensor; `refs` are None at steps without it. Damage is told in the readings.

    `num_tensors`: of the model, over which the samples are spread. `last`: compare with the last step, too. All shapes
    must be equal.
    """
    readings = [TensorReading(error="" if ref is not None else "is not there") for ref in refs]
    present = [number for number, ref in enumerate(refs) if ref is not None]
    if not present:
        return readings
    shape = tuple(refs[present[0]].shape)  # type: ignore[union-attr]
    places = sample_places(name, prod(shape), num_tensors)
    columns = {number: _Column(refs[number], readings[number], len(places)) for number in present}  # type: ignore[arg-type]
    for start, rows in pieces_of(shape):
        first = previous = final = None
        if last:
            final = columns[present[-1]].values(rows)
        for number in present:
            column = columns[number]
            values = column.read(rows)
            if values is None:
                continue
            column.sample(values, start, places)
            first = _compared(readings[number], "first", values, first)
            previous = _compared(readings[number], "previous", values, previous)
            if final is not None and number != present[-1]:
                _compared(readings[number], "last", values, final)
            previous = values
    for number in present:
        columns[number].finish()
    return readings


def _compared(reading: TensorReading, with_what: str, values: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
    """Compare with another step's piece, where there is one; returns it, or else the piece itself."""
    if other is None:
        return values
    apart = getattr(reading, with_what) or Apart()
    apart.add(values, other)
    setattr(reading, with_what, apart)
    return other


class _Column:
    """One step's tensor while its pieces are read."""

    def __init__(self, ref: TensorRef, reading: TensorReading, samples: int) -> None:
        self.ref, self.reading = ref, reading
        self.mark = hashlib.sha256(f"{tuple(ref.shape)} {ref.dtype_name}".encode())
        self.reading.sample = np.zeros(samples, np.float32)
        self.verifying: AbstractContextManager = verifying([ref])
        self.verifying.__enter__()

    def values(self, rows: list[slice]) -> torch.Tensor | None:
        """A piece in fp32, flat; None once the tensor could not be read."""
        if self.reading.error:
            return None
        try:
            return self.ref.read(rows).float().flatten()
        except CheckpointError as error:
            self.reading.error = str(error)
            return None

    def read(self, rows: list[slice]) -> torch.Tensor | None:
        """The same, which is counted in the reading."""
        if self.reading.error:
            return None
        try:
            piece = self.ref.read(rows)
        except CheckpointError as error:
            self.reading.error = str(error)
            return None
        self.mark.update(as_bytes(piece))
        values, reading = piece.float().flatten(), self.reading
        low, high = torch.aminmax(values) if values.numel() else (torch.zeros(()), torch.zeros(()))
        squares = values * values
        reading.count += values.numel()
        reading.zeros += values.numel() - int(torch.count_nonzero(values))
        reading.total += float(values.sum(dtype=torch.float64))
        reading.squares += float(squares.sum(dtype=torch.float64))
        reading.third += float(torch.dot(squares, values))
        reading.fourth += float(torch.dot(squares, squares))
        if not (math.isfinite(low) and math.isfinite(high)):
            reading.not_finite += int((~torch.isfinite(values)).sum())
        reading.largest = max(reading.largest, abs(float(low)), abs(float(high)))
        return values

    def sample(self, values: torch.Tensor, start: int, places: np.ndarray) -> None:
        """Keep the values at those of the places that lie in a piece which begins at element `start`."""
        first, stop = np.searchsorted(places, [start, start + values.numel()])
        if first < stop:
            self.reading.sample[first:stop] = values.numpy()[places[first:stop] - start]

    def finish(self) -> None:
        """The digest, once all bytes are verified."""
        try:
            self.verifying.__exit__(None, None, None)
        except CheckpointError as error:
            self.reading.error = self.reading.error or str(error)
        self.reading.digest = self.mark.hexdigest()


def pieces_of(shape: Sequence[int], elements: int = PIECE_ELEMENTS) -> Iterator[tuple[int, list[slice]]]:
    """(first element, slices) of pieces of a tensor in row-major order: as many whole rows as fit, at least one."""
    if not shape:
        yield 0, []
        return
    row = max(1, prod(shape[1:]))
    step = max(1, elements // row)
    for start in range(0, shape[0], step):
        yield start * row, [slice(start, min(start + step, shape[0]))]


def sample_places(name: str, count: int, num_tensors: int) -> np.ndarray:
    """Places of a tensor's values that are kept, in order: the same for every step, drawn by the tensor's name."""
    wanted = min(count, max(FEWEST, min(MOST, SAMPLES // max(1, num_tensors))))
    if wanted == count:
        return np.arange(count)
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    return np.unique(draw.integers(0, count, wanted))
