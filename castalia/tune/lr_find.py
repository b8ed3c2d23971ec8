"""The learning-rate range test (1506.01186): the rate rises at every step; where does the loss fall fastest?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from castalia.config.lr_schedule import LearningRate
from castalia.config.schema import RunConfig
from castalia.errors import TrainingError
from castalia.train.setup import start
from castalia.train.start_checks import find_obstacles, refuse

SMOOTHED = 0.05  # losses are averaged over this share of the steps to either side
DIVERGED = 0.5  # diverged: the loss has risen again by this share of what it fell,
LEAST_RISE = 0.1  # and at least this share of the first loss
LEAST_FALL = 0.02  # of the first loss: less counts as none


class RangeTest(NamedTuple):
    """The result of a range test."""

    rates: list[float]
    losses: list[float]  # of each step, before its update; the last one may be infinite
    smoothed: list[float]  # the same, averaged over steps nearby; what follows is told from these
    suggestion: float  # the rate at which the loss falls fastest
    lowest: float  # the rate at which the loss is lowest
    diverged: bool
    notes: tuple[str, ...] = ()  # on the checkpoint that the test began from


@dataclass(frozen=True)
class RisingRate(LearningRate):
    """Rises from `minimum` at the first update to `peak` at the last, by the same factor each time."""

    def __call__(self, updates: int) -> float:
        """The learning rate of the update after so many."""
        return self.minimum * (self.peak / self.minimum) ** (updates / (self.end - 1))


def find_rate(config: RunConfig, lowest: float = 1e-6, highest: float = 1.0, steps: int = 100) -> RangeTest:
    """Trains for `steps` steps, or until the loss diverges. Nothing is written; the same config gives the same result.

    Called on all ranks. Raises TrainingError if the loss falls at no rate.
    """
    config = _of_length(config, steps)
    refuse(find_obstacles(config, writes=False))
    session = start(config)
    # In place of the config's schedule; everything else is as in training.
    session.step.rate = RisingRate(highest, lowest, 0.0, steps, "exponential")
    losses: list[float] = []
    while len(losses) < steps and not _diverges(losses, steps):
        number = len(losses)
        loss, norm = session.step.gradients(number, session.batch(number))
        if math.isfinite(loss + norm):
            session.step.apply()
        else:
            session.step.skip()
        # A gradient that is not finite ends the test, except in fp16, where a smaller loss scale mends it.
        losses.append(loss if math.isfinite(norm) or session.step.scaler else math.inf)
    rates = [session.step.rate(number) for number in range(len(losses))]
    suggestion, at_lowest = suggest(rates, losses)
    notes = session.source.notes if session.source else ()
    return RangeTest(rates, losses, _curve(losses)[1], suggestion, at_lowest, _diverges(losses, steps), notes)


def _of_length(config: RunConfig, steps: int) -> RunConfig:
    """The config with `steps` steps, which resumes nothing."""
    return config.with_(
        {"train.steps": steps, "train.epochs": None, "checkpoint.resume": None, "checkpoint.step": None}
    )


def _diverges(losses: list[float], steps: int) -> bool:
    if not losses or not math.isfinite(losses[-1]):
        return bool(losses)
    curve = _smoothed(losses, steps)
    return bool(curve[-1] > curve.min() + max(DIVERGED * (curve[0] - curve.min()), LEAST_RISE * curve[0]))


def _smoothed(losses: list[float], steps: int) -> np.ndarray:
    """A centred moving average, which becomes narrower towards both ends."""
    sums, at = np.concatenate([[0.0], np.cumsum(losses)]), np.arange(len(losses))
    reach = np.minimum(np.minimum(at, len(losses) - 1 - at), max(1, round(SMOOTHED * steps)))
    return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)


def suggest(rates: list[float], losses: list[float]) -> tuple[float, float]:
    """The rate at which the smoothed loss falls fastest, and the one at which it is lowest.

    Rates rise by a constant factor. Raises TrainingError if the loss falls at no rate.
    """
    if not math.isfinite(losses[0]):
        raise TrainingError(
            f"the loss is {losses[0]} before anything was learned: where the run begins from a checkpoint, "
            "`castalia inspect --tensors` lists its weights that are NaN or infinite"
        )
    places, whole = _curve(losses)
    curve = np.array([whole[place] for place in places])
    bottom = int(curve.argmin())
    if curve[bottom] > (1 - LEAST_FALL) * curve[0] or bottom < 2:
        raise TrainingError(
            f"the loss did not fall at any rate from {rates[0]:.1e} to {rates[-1]:.1e} ({len(losses)} steps); give "
            "other --lowest and --highest, more --steps, or look at the data with castalia data batch"
        )
    steepest = int(np.gradient(curve)[: bottom + 1].argmin())  # over the rate's logarithm
    return rates[places[steepest]], rates[places[bottom]]


def _curve(losses: list[float]) -> tuple[list[int], list[float]]:
    """The steps whose loss is finite, and the smoothed loss of each step, which is infinite at the others."""
    places = [number for number, loss in enumerate(losses) if math.isfinite(loss)]
    smoothed = [math.inf] * len(losses)
    for place, loss in zip(places, _smoothed([losses[place] for place in places], len(places)), strict=True):
        smoothed[place] = float(loss)
    return places, smoothed
