"""How far the optimizer can have moved a tensor between two steps: what lies beyond is no continuation.

Adam's update is lr * m / sqrt(v). By the inequality of Cauchy and Schwarz, with r = b1^2 / b2, after t updates

    |m| / sqrt(v) <= c(t) = (1 - b1) / sqrt(1 - b2) * sqrt((1 - r^t) / (1 - r)) * sqrt(1 - b2^t) / (1 - b1^t)

for whatever gradients: 1.17 for betas of 0.9 and 0.95, 7.3 for 0.9 and 0.999. Clipping and epsilon only make it
smaller; decoupled decay adds lr * decay * |w|. Lion moves each element by lr. Of Muon and Adafactor the root mean
square of an update is bounded, of SGD its norm, if gradients are clipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from castalia.checkpoint.neox_defects import clip_norm_of
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.lr_schedule import STORED_NAMES, LearningRate
from castalia.config.schema import RunConfig
from castalia.train.optimizer import UpdateRule, update_rule
from castalia.train.schedule import learning_rate

SLACK = 1.05  # for rounding in the optimizer's own arithmetic, and for weights that were larger in between
FP32_EPS = 2.0**-23
ADAFACTOR_SMALLEST = 1e-3  # torch.optim.Adafactor: the smallest size of a tensor that its rate is relative to
MUON_RMS = 0.2 * 1.3  # torch.optim.Muon, match_rms_adamw; singular values come out up to 1.2, a little more in bf16


@dataclass(frozen=True)
class Training:
    """What a checkpoint, or a config, says of how its weights were moved."""

    config: RunConfig
    rate: LearningRate
    clip_norm: float | None
    summed_bias_ranks: int = 1
    release: str | None = None

    def lr_sum(self, begin: int, end: int) -> float:
        """The sum of the learning rates of the updates after the first `begin`, up to update `end`."""
        if end <= begin:
            return 0.0
        sums = _sums(self.rate, 1 << end.bit_length())
        return float(sums[end] - sums[begin])

    def rule(self, name: str) -> UpdateRule:
        """The update rule of a tensor."""
        model = self.config.model
        width, layers = (model.width_multiplier, model.num_layers) if model else (1.0, 0)
        return update_rule(name, self.config.optimizer, width, layers, self.summed_bias_ranks)


@dataclass(frozen=True)
class Reach:
    """The largest possible movement of a tensor; None: of this kind there is no bound."""

    largest: float | None = None  # of one element
    rms: float | None = None
    norm: float | None = None


def training_of(checkpoint: Checkpoint | None, config: RunConfig | None = None) -> Training | None:
    """From a checkpoint's config and stored schedule; `config` is taken where these say nothing. None: unknown."""
    own = checkpoint.config if checkpoint else None
    stored = checkpoint.progress.schedule if checkpoint else None
    if own is None or not (stored or own.train.steps):
        own = config
    if own is None:
        return None
    release = checkpoint.release if checkpoint else None
    if stored and set(STORED_NAMES.values()) <= stored.keys():
        rate = LearningRate.of_stored(stored, release)
    elif own.train.steps or own.schedule.decay_steps:
        rate = learning_rate(own, own.train.steps or 0, release)
    else:
        return None
    clip = clip_norm_of(checkpoint) if checkpoint and checkpoint.config is own else own.optimizer.clip_norm
    clip = None if checkpoint and checkpoint.norm_ranks != (1, 1) else clip
    return Training(own, rate, clip, checkpoint.summed_bias_ranks if checkpoint else 1, release)


def reach(
    training: Training,
    name: str,
    lr_sum: float,
    updates: tuple[int, int],
    count: int,
    largest: float,
    norm: float,
    dtype_name: str,
) -> Reach:
    """How far a tensor can have moved over these updates, whose learning rates sum up to `lr_sum`.

    `count`, `largest` and `norm`: of the tensor's values, whichever of the two steps has the larger. `dtype_name`: the
    coarser one in which it is stored.
    """  # fmt: skip
    rule, optimizer = training.rule(name), training.config.optimizer
    size, rms = lr_sum * rule.scale * SLACK, norm / math.sqrt(max(count, 1))
    number = updates[1] - updates[0]
    rounding = torch.finfo(getattr(torch, dtype_name)).eps + number * FP32_EPS
    shrinking = size * rule.decay
    match rule.kind:
        case "adamw":
            factor = adam_factor(*optimizer.betas, updates[1] + 1)
            if training.release == "v1":  # which resumes without Adam's step: its correction of the bias begins anew
                factor *= max(1.0, math.sqrt(1 - optimizer.betas[1]) / (1 - optimizer.betas[0]))
            return Reach(largest=size * factor + (shrinking + rounding) * largest)
        case "lion":
            return Reach(largest=size + (shrinking + rounding) * largest)
        case "muon":
            return Reach(rms=size * MUON_RMS + (shrinking + rounding) * rms)
        case "adafactor":
            return Reach(rms=size * max(ADAFACTOR_SMALLEST, rms) + (shrinking + rounding) * rms)
    if training.clip_norm is None:
        return Reach()
    factor = 1 / (1 - optimizer.momentum)
    return Reach(norm=factor * (size * training.clip_norm + shrinking * norm) + rounding * norm)


@lru_cache(maxsize=64)
def _sums(rate: LearningRate, updates: int) -> np.ndarray:
    """The sum of the learning rates of all updates before each of the first so many, [updates + 1]."""
    return np.concatenate([[0.0], np.cumsum([rate(number) for number in range(updates)])])


@lru_cache
def adam_factor(first: float, second: float, updates: int) -> float:
    """The largest c(t) of the first `updates` updates; it settles long before the thousands."""
    t = np.arange(1, max(1, min(updates, 5000)) + 1, dtype=np.float64)
    ratio = first * first / second
    powers = t if ratio == 1 else (1 - ratio**t) / (1 - ratio)
    corrections = np.sqrt(1 - second**t) / (1 - first**t)
    with np.errstate(over="ignore"):
        return float(((1 - first) / math.sqrt(1 - second) * np.sqrt(powers) * corrections).max())
