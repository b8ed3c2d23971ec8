"""The learning rate as a pure function of the number of updates, and its form in checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Attribute -> the name under which GPT-NeoX's `AnnealingLR` stores it.
STORED_NAMES = {
    "peak": "start_lr",
    "minimum": "min_lr",
    "warmup": "warmup_iter",
    "end": "end_iter",
    "style": "decay_style",
}
COOLDOWN = {"cooldown": "cooldown_iter"}  # of style wsd, which GPT-NeoX does not have


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of each optimizer update, given the number of updates before it.

    All styles but wsd and inverse_sqrt are GPT-NeoX's (`megatron/learning_rates.py`), with the defects of a `release`
    if one is given.
    """

    peak: float
    minimum: float
    warmup: float  # steps, not rounded
    end: int  # step at which the decay ends, counted from the first one
    style: str
    cooldown: float = 0.0  # wsd: steps before the end in which the rate falls
    release: str | None = None  # "v1" or "head" of GPT-NeoX, with their defects; None: without any

    def __call__(self, updates: int) -> float:
        """The learning rate of the update after so many."""
        if self.release == "v1":
            return self._first_release(updates)
        if self.warmup > 0 and updates <= self.warmup:
            rate = self.peak * max(1, updates) / self.warmup
            return rate if self.release else min(rate, self.peak)  # GPT-NeoX exceeds the peak if warmup < 1
        span = self.end - self.warmup
        share = (updates - self.warmup) / span if span > 0 else 1.0
        if self.style == "constant":
            return self.peak
        if self.style == "inverse_sqrt":
            return max(self.minimum, self.peak * math.sqrt(max(1.0, self.warmup) / max(1, updates)))
        if self.style == "wsd":
            left = (self.end - updates) / self.cooldown if self.cooldown > 0 else 1.0
            return self.minimum + (self.peak - self.minimum) * min(1.0, max(0.0, left))
        if self.style == "linear":
            return max(self.minimum, self.peak * (1 - share))
        if self.style == "exponential":
            return max(self.minimum, self.peak * math.exp(-0.693 * share))
        share = share if self.release else min(share, 1.0)  # GPT-NeoX's cosine rises again after its end
        return self.minimum + (self.peak - self.minimum) / 2 * (math.cos(math.pi * share) + 1)

    def _first_release(self, updates: int) -> float:
        """v1: the warm-up starts at 0, and the decay takes `end` steps after the warm-up, so that it ends too high."""
        if self.warmup > 0 and updates <= self.warmup:
            return self.peak * updates / self.warmup
        share = (updates - self.warmup) / self.end
        decays = {
            "constant": 1.0,
            "linear": 1 - share,
            "cosine": (math.cos(math.pi * share) + 1) / 2,
            "exponential": math.exp(-0.693 * share),
        }
        return max(self.minimum, self.peak * decays[self.style])

    @classmethod
    def of_stored(cls, stored: Mapping[str, Any], release: str | None = None) -> LearningRate:
        """The schedule from what `stored` returned, or from the scheduler state of a GPT-NeoX checkpoint."""
        names = STORED_NAMES | COOLDOWN
        return cls(**{field: stored[name] for field, name in names.items() if name in stored}, release=release)

    def stored(self) -> dict[str, object]:
        """The values to store in a checkpoint, under GPT-NeoX's names."""
        names = STORED_NAMES | (COOLDOWN if self.style == "wsd" else {})
        return {name: getattr(self, field) for field, name in names.items()}
