"""Figures of every tensor and layer at every step: size, shape of the distribution, movement, optimizer state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from castalia.bars import Advance, unseen
from castalia.checkpoint.rules import MOMENTS
from castalia.errors import CheckpointError
from castalia.series.audit import Entry, Series
from castalia.series.checkup import layer_of
from castalia.series.members import Member
from castalia.series.moments import state_at
from castalia.series.resuming import identity_of, one_thread_each, work_through
from castalia.series.tensor_pass import Apart, TensorReading, pieces_of, read_column, sample_places
from castalia.series.travel import Training
from castalia.storage.lazy import TensorRef

LANCZOS_STEPS = 32
PRECISION = 1e-5  # relative, of a singular value
HELD_BYTES = 64 << 20  # a matrix up to this size is read once, a larger one in each step
QUANTILES = (0.05, 0.5, 0.95)
AGAINST: tuple[Literal["first", "previous", "last"], ...] = ("first", "previous", "last")


@dataclass(frozen=True)
class OptimizerFigures:
    """One tensor's optimizer state at a step."""

    zero_first: float | None = None  # share of the first moments, or of the momentum, that is zero
    zero_second: float | None = None
    update_ratio: float | None = None  # RMS of the last update over the RMS of the weights
    rates: tuple[float | None, float | None, float | None] = (None, None, None)  # quantiles of lr / (sqrt(v) + eps)


def tensor_stats(
    members: Sequence[Member],
    output: Path,
    *,
    optimizer: bool = False,
    jobs: int = 1,
    advance: Advance = unseen,
) -> list[dict[str, Any]]:
    """A row for each tensor and for each layer at each step, in this order; the columns are the same in all rows.

    `output`: the table that the caller writes; the journal beside it is the caller's to remove then. Raises
    CheckpointError for a step that cannot be read: `castalia series check` says more.
    """
    series = Series(members)
    for entry in series.entries:
        if not entry.sound:
            raise CheckpointError(f"step {entry.member.step}: {entry.report.facts[0].text}")

    def work(name: str) -> list[dict[str, Any]]:
        """The rows of one tensor."""
        refs = [series.tensor(entry, name) for entry in series.entries]
        readings = read_column(name, refs, len(series.names), last=True)
        if error := next((reading.error for reading in readings if reading.error), ""):
            raise CheckpointError(error if name in error else f"{name}: {error}")
        return [
            _row(entry, name, number, readings) | spectrum | _optimizer_row(entry, name, len(series.names), optimizer)
            for number, (entry, spectrum) in enumerate(zip(series.entries, _spectra(refs, readings), strict=True))
        ]

    identity = identity_of(members, "stats", optimizer)
    with one_thread_each(jobs):
        by_tensor = work_through(series.names, work, identity, output, jobs=jobs, advance=advance)
    return [row for name in series.names for row in by_tensor[name]] + layer_rows(
        [r for rows in by_tensor.values() for r in rows]
    )


def _row(entry: Entry, name: str, number: int, readings: Sequence[TensorReading]) -> dict[str, Any]:
    reading = readings[number]
    others = {"first": readings[0], "previous": readings[max(0, number - 1)], "last": readings[-1]}
    row: dict[str, Any] = {
        "step": entry.member.step,
        "layer": layer_of(name),
        "tensor": name,
        "values": reading.count,
        "norm": reading.norm,
        "mean": reading.mean,
        "std": math.sqrt(reading.variance),
        "max": reading.largest,
        "kurtosis": reading.kurtosis,
    }
    for key in AGAINST:
        apart: Apart | None = getattr(reading, key)
        row |= _compared(key, apart, reading.norm, others[key].norm)
    return row


def _compared(key: str, apart: Apart | None, norm: float, other: float) -> dict[str, float | None]:
    """Distance and cosine; of a step with itself they are 0 and 1, of the first one with the one before unknown."""
    if apart is None:
        itself = key != "previous"
        return {f"{key}_distance": 0.0 if itself else None, f"{key}_cosine": 1.0 if itself else None}
    cosine = apart.product / (norm * other) if norm and other else None
    return {f"{key}_distance": math.sqrt(apart.squares), f"{key}_cosine": cosine}


def _spectra(refs: Sequence[TensorRef | None], readings: Sequence[TensorReading]) -> Iterator[dict[str, float | None]]:
    """The largest singular value of each step; equal tensors are computed once."""
    known: dict[str, float | None] = {}
    for ref, reading in zip(refs, readings, strict=True):
        if reading.digest not in known:
            known[reading.digest] = top_singular_value(ref) if ref is not None and len(ref.shape) == 2 else None
        yield {"top_singular_value": known[reading.digest]}


def top_singular_value(ref: TensorRef) -> float:
    """The largest singular value of a matrix, by Lanczos' method on A^T A, a piece of the matrix at a time."""
    held = list(_matrix_pieces(ref)) if ref.num_bytes <= HELD_BYTES else None
    draw = torch.Generator().manual_seed(0)
    direction = torch.randn(ref.shape[1], dtype=torch.float64, generator=draw)
    basis = [direction / direction.norm()]
    diagonal: list[float] = []
    beside_it: list[float] = []
    value = 0.0
    for _ in range(min(LANCZOS_STEPS, ref.shape[1])):
        image = torch.zeros(ref.shape[1], dtype=torch.float64)
        vector = basis[-1].float()
        for piece in held or _matrix_pieces(ref):
            image += piece.t() @ (piece @ vector)
        diagonal.append(float(image @ basis[-1]))
        for each in (*basis, *basis):  # twice, or rounding brings back what was taken out
            image -= (image @ each) * each
        before, value = value, _largest_eigenvalue(diagonal, beside_it)
        length = float(image.norm())
        if abs(value - before) <= PRECISION * value or length <= 1e-7 * value:
            break
        beside_it.append(length)
        basis.append(image / length)
    return math.sqrt(max(value, 0.0))


def _largest_eigenvalue(diagonal: Sequence[float], beside_it: Sequence[float]) -> float:
    """Of a symmetric tridiagonal matrix."""
    off = np.diag(beside_it[: len(diagonal) - 1], 1)
    return float(np.linalg.eigvalsh(np.diag(diagonal) + off + off.T)[-1])


def _matrix_pieces(ref: TensorRef) -> Iterator[torch.Tensor]:
    return (ref.read(rows).float() for _, rows in pieces_of(ref.shape))


def _optimizer_row(entry: Entry, name: str, num_tensors: int, asked: bool) -> dict[str, Any]:
    if not asked:
        return {}
    figures = optimizer_figures(entry, name, num_tensors)
    row: dict[str, Any] = {"zero_first_moments": figures.zero_first, "zero_second_moments": figures.zero_second}
    row |= {"update_ratio": figures.update_ratio}
    return row | {f"effective_lr_{100 * q:02.0f}": rate for q, rate in zip(QUANTILES, figures.rates, strict=True)}


def optimizer_figures(entry: Entry, name: str, num_tensors: int) -> OptimizerFigures:
    """The figures of a tensor's optimizer state, a piece at a time; updates and rates are those of Adam."""
    state, training = state_at(entry, name), entry.training
    if state is None:
        return OptimizerFigures()
    if not set(MOMENTS) <= state.tensors.keys():
        momentum = next((ref for kind, ref in state.tensors.items() if kind != "master"), None)
        return OptimizerFigures(zero_first=_zero_share(momentum) if momentum is not None else None)
    weight = entry.checkpoint.model[name] if entry.checkpoint else state.tensors["master"]
    first, second = (state.tensors[kind] for kind in MOMENTS)
    count, zero, updates, size = math.prod(first.shape), [0, 0], 0.0, 0.0
    places = sample_places(name, count, num_tensors)
    rates = np.zeros(len(places))
    for start, rows in pieces_of(first.shape):
        m, v = first.read(rows).double().flatten(), second.read(rows).double().flatten()
        zero = [zero[0] + int((m == 0).sum()), zero[1] + int((v == 0).sum())]
        if training is None or state.step == 0:
            continue
        denominator = _denominator(v, training, state.step)
        updates += float((m / (1 - training.config.optimizer.betas[0] ** state.step) / denominator).square().sum())
        size += float(weight.read(rows).double().square().sum())
        at, stop = np.searchsorted(places, [start, start + m.numel()])
        rates[at:stop] = (1 / denominator).numpy()[places[at:stop] - start]
    shares = zero[0] / max(count, 1), zero[1] / max(count, 1)
    if training is None or state.step == 0:
        return OptimizerFigures(*shares)
    lr = training.rate(max(0, entry.updates - 1)) * training.rule(name).scale  # of the update that led to this step
    low, median, high = (float(rate) * lr for rate in np.quantile(rates, QUANTILES))
    return OptimizerFigures(*shares, lr * math.sqrt(updates / size) if size else None, (low, median, high))


def _denominator(second: torch.Tensor, training: Training, step: int) -> torch.Tensor:
    """sqrt(v) + eps, with Adam's correction of the bias towards zero."""
    settings = training.config.optimizer
    return (second / (1 - settings.betas[1] ** step)).sqrt() + settings.eps


def _zero_share(ref: TensorRef) -> float:
    pieces = list(ref.pieces())
    return sum(int((piece == 0).sum()) for piece in pieces) / max(1, sum(piece.numel() for piece in pieces))


def layer_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The figures of each layer at each step, from those of its tensors; what cannot be added up is None."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["layer"], row["step"]), []).append(row)
    return [_layer_row(layer, step, group) for (layer, step), group in groups.items()]


def _layer_row(layer: str, step: int, group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    count = sum(row["values"] for row in group)
    mean = sum(row["mean"] * row["values"] for row in group) / count
    norm = _root(row["norm"] for row in group)
    made: dict[str, Any] = dict.fromkeys(group[0])
    made |= {"step": step, "layer": layer, "tensor": "", "values": count, "norm": norm, "mean": mean}
    made |= {"std": math.sqrt(max(norm**2 / count - mean**2, 0.0)), "max": max(row["max"] for row in group)}
    for key in AGAINST:
        if all(row[f"{key}_distance"] is not None for row in group):
            made[f"{key}_distance"] = _root(row[f"{key}_distance"] for row in group)
    return made


def _root(values: Iterator[float]) -> float:
    return math.sqrt(sum(value**2 for value in values))
