"""Samples and statistics of stored values, without torch.

A sample reads some rows without verifying checksums, so that inspecting hundreds of gigabytes takes no longer than
inspecting a few.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import prod, sqrt

import numpy as np

from castalia.errors import CheckpointError
from castalia.storage.derived import cut_runs
from castalia.storage.lazy import ITEM_BYTES, ByteRun, TensorRef

SPAN_ELEMENTS = 4096
MAX_ROW = 1 << 16  # values; of longer rows only the beginning is sampled


def middle(ref: TensorRef, count: int = 256) -> np.ndarray:
    """At most `count` stored values from the middle of a tensor on, in fp32.

    Values are comparable between tensors that are stored in row-major order.
    """
    start = prod(ref.shape) // 2
    parts = [values for run in cut_runs(ref.runs(), start, start + count) for values in _read(run, [(0, run.count)])]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def rounded(values: np.ndarray, dtype_name: str) -> np.ndarray:
    """fp32 values rounded to a dtype, to nearest with ties to even as torch does; the result is fp32 again."""
    if dtype_name == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype_name == "bfloat16":
        bits = values.view("<u4")
        # bf16 is the upper half of fp32: add half a unit, and one bit more where the result would be odd
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype("<u4").view("<f4")
    return values


def fingerprint(tensors: Mapping[str, TensorRef]) -> str:
    """A digest of a few stored values of each tensor, and of all names, shapes and dtypes."""
    mark = blake2b(digest_size=16)
    for name, ref in sorted(tensors.items()):
        mark.update(f"{name} {ref.dtype_name} {tuple(ref.shape)}".encode())
        mark.update(middle(ref).tobytes())
    return mark.hexdigest()


@dataclass
class Sums:
    """Statistics of the values added so far. `mean`, `std`, `low` and `high` are those of the finite values."""

    count: int = 0
    not_finite: int = 0
    rows: int = 0
    zero_rows: int = 0
    total: float = 0.0
    squares: float = 0.0
    low: float = float("inf")
    high: float = float("-inf")

    def add(self, values: np.ndarray, row: int) -> None:
        """Add values in row-major order; `row` is the length of a row. A part of a row at the end counts as a row."""
        self.count += values.size
        edges = np.arange(0, values.size, max(row, 1))
        self.rows += edges.size
        self.zero_rows += int((np.add.reduceat(values != 0, edges, dtype=np.int64) == 0).sum()) if values.size else 0
        finite = values[np.isfinite(values)]
        self.not_finite += values.size - finite.size
        if finite.size:
            wide = finite.astype(np.float64)
            self.total += float(wide.sum())
            self.squares += float(wide @ wide)
            self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))

    def merge(self, other: Sums) -> None:
        """Add the values that `other` has seen."""
        for name in ("count", "not_finite", "rows", "zero_rows", "total", "squares"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    @property
    def finite(self) -> int:
        """The number of finite values."""
        return self.count - self.not_finite

    @property
    def mean(self) -> float:
        """0 if no value is finite."""
        return self.total / self.finite if self.finite else 0.0

    @property
    def std(self) -> float:
        """The standard deviation of the population; 0 if no value is finite."""
        return sqrt(max(self.squares / self.finite - self.mean**2, 0.0)) if self.finite else 0.0

    @property
    def all_zero(self) -> bool:
        """Whether there are values, and all of them are zero."""
        return self.count > 0 and self.zero_rows == self.rows


def sample(ref: TensorRef, spans: int) -> Sums:
    """Statistics of at most `spans` stretches of rows, evenly spread over a tensor. Small tensors are read whole.

    Checksums are not verified. Raises CheckpointError for truncated files.
    """
    parts, result = ref.runs(), Sums()
    total = sum(run.count for run in parts)
    wanted = [total * i // spans for i in range(spans)] if total > spans * SPAN_ELEMENTS else None
    begin = 0
    for run in parts:
        # Each run is opened once, and the wanted positions that lie in it are read.
        if wanted is None:
            pieces: Sequence[tuple[int, int]] = [(0, run.count)]
        else:
            starts = [position - begin for position in wanted if begin <= position < begin + run.count]
            pieces = [_whole_rows(run, start) for start in starts]
        for values in _read(run, pieces):
            result.add(values, run.row)
        begin += run.count
    return result


def _whole_rows(run: ByteRun, position: int) -> tuple[int, int]:
    """(start, stop) of whole rows around a position, about `SPAN_ELEMENTS` values."""
    row = max(run.row, 1)
    start = position // row * row
    length = min(max(row, SPAN_ELEMENTS // row * row), MAX_ROW)
    return start, min(start + length, run.count)


def _read(run: ByteRun, pieces: Sequence[tuple[int, int]]) -> Iterator[np.ndarray]:
    if not pieces:
        return
    size = ITEM_BYTES[run.dtype_name]
    with open(run.path, "rb", buffering=0) as file:
        for start, stop in pieces:
            # Without the extent's reader, which would verify the whole block that these bytes lie in.
            data = os.pread(file.fileno(), (stop - start) * size, run.offset + start * size)
            if len(data) != (stop - start) * size:
                raise CheckpointError(f"{run.path} is truncated: a tensor ends at byte {run.offset + run.num_bytes}")
            yield as_float32(data, run.dtype_name)


def as_float32(data: bytes, dtype_name: str) -> np.ndarray:
    """Stored bytes as fp32 values. NumPy has no bf16, which is the upper half of fp32."""
    if dtype_name == "bfloat16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, dtype_name).astype(np.float32)
