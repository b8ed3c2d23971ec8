"""Preference tuning: DPO, KTO and reward models, as losses of one number for each sequence.

The number is a sequence's log-probability, or a reward model's reward. Sequences of pairs alternate: preferred,
rejected, preferred, ... A step's loss is the mean over its pairs (KTO: its sequences), whatever the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from castalia.config.schema import PreferenceConfig, RunConfig
from castalia.data.loader import Batch
from castalia.errors import DataError
from castalia.parallel.executor import Executor, Rows, to_device


class Judged(NamedTuple):
    """Losses, and what is reported of them: sums and what they are divided by, for the preferred and the rejected."""

    losses: Tensor  # [pairs], of KTO [sequences]
    rewards: Tensor  # [sequences]
    wanted: Tensor  # bool [sequences]: preferred, or desirable
    right: Tensor  # bool [pairs], of KTO [sequences]: whether the rewards agree with the data
    kl: Tensor | None = None  # of KTO


def dpo(logps: Tensor, references: Tensor, num_tokens: Tensor, cfg: PreferenceConfig) -> Judged:
    """Direct preference optimization. All are [sequences]; `num_tokens` counts the labels, over which IPO averages."""
    ratios = logps - references
    rewards = cfg.beta * ratios.detach()
    if cfg.loss == "ipo":
        chosen, rejected = _sides(ratios / num_tokens)
        losses = (chosen - rejected - 1 / (2 * cfg.beta)) ** 2
    else:
        chosen, rejected = _sides(ratios)
        losses = -F.logsigmoid(cfg.beta * (chosen - rejected))
    return Judged(losses, rewards, _first_of_two(rewards), _in_order(rewards))


def reward_model(rewards: Tensor, square: float) -> Judged:
    """Bradley-Terry: the preferred text is to get the higher reward. `square` times both squares is added."""
    chosen, rejected = _sides(rewards)
    losses = -F.logsigmoid(chosen - rejected) + square * (chosen**2 + rejected**2)
    known = rewards.detach()
    return Judged(losses, known, _first_of_two(known), _in_order(known))


def kto(logps: Tensor, references: Tensor, wanted: Tensor, cfg: PreferenceConfig) -> Judged:
    """Kahneman-Tversky optimization of a micro-batch: [sequences], `wanted` says which are desirable.

    What a reward is compared with is the divergence from the reference model. As in the original, each half of the
    micro-batch takes the mean log-ratio of the other half for it; it is never negative.
    """
    ratios = logps - references
    halves = ratios.detach().chunk(2)
    if len(halves) < 2:
        raise DataError("train.objective=kto compares the sequences of a micro-batch: it needs 2 or more")
    points = (other.mean().clamp(min=0) for other in reversed(halves))
    kl = torch.cat([point.expand(len(half)) for half, point in zip(halves, points, strict=True)])
    sign = torch.where(wanted, 1.0, -1.0)
    weight = torch.where(wanted, cfg.desirable_weight, cfg.undesirable_weight)
    losses = weight * (1 - F.sigmoid(cfg.beta * sign * (ratios - kl)))
    rewards = cfg.beta * ratios.detach()
    return Judged(losses, rewards, wanted, rewards * sign > 0, kl)


def _sides(values: Tensor) -> tuple[Tensor, Tensor]:
    return values[0::2], values[1::2]


def _first_of_two(values: Tensor) -> Tensor:
    return torch.arange(len(values), device=values.device) % 2 == 0


def _in_order(rewards: Tensor) -> Tensor:
    chosen, rejected = _sides(rewards)
    return chosen > rejected


class PreferenceLoss:
    """The objective of a run. `reference` is the frozen model, on the ranks of `engine`; None where none is asked."""

    def __init__(self, config: RunConfig, engine: Executor, reference: Executor | None, accumulation: int) -> None:
        self.objective, self.settings, self.square = config.train.objective, config.preference, config.train.z_loss
        self.engine, self.reference, self.accumulation = engine, reference, accumulation
        self.tally = _Tally()
        self.report: dict[str, float] = {}  # of the last step

    def forward_backward(self, batch: Batch, scale: float, seeds: list[int]) -> Tensor:
        """As `Executor.forward_backward`, for the mean loss of the step. `make_report` then tells about it."""
        judge, self.tally = self._judge(batch), _Tally()

        def losses(values: Tensor, micro: int) -> Tensor:
            judged = judge(values, micro)
            self.tally.add(judged)
            return judged.losses.sum()

        number = self.engine.sum_over_data(self._num_losses(batch))
        return self.engine.forward_backward(Rows.of(batch), [1 / number] * self.accumulation, scale, seeds, losses)

    def make_report(self) -> None:
        """On all ranks together. It waits for the device, so it comes after the whole step is under way."""
        self.report = self.tally.means(self.engine)

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Loss and rewards of this data rank's parts of batches, over all ranks; batches have a step's layout."""
        tally, total, number = _Tally(), torch.zeros((), dtype=torch.float64, device=self.engine.device), 0.0
        with self.engine.evaluating():
            for batch in batches:
                judge = self._judge(batch)
                for micro, values in enumerate(self.engine.each_sequence(Rows.of(batch)).chunk(self.accumulation)):
                    judged = judge(values, micro)
                    tally.add(judged)
                    total += judged.losses.sum()
                number += self._num_losses(batch)
        loss = self.engine.sum_over_data(float(total)) / self.engine.sum_over_data(number)
        return {"loss": loss} | tally.means(self.engine)

    def _num_losses(self, batch: Batch) -> float:
        return len(batch.tokens) / (1 if self.objective == "kto" else 2)

    def _judge(self, batch: Batch) -> Callable[[Tensor, int], Judged]:
        """From the values of a micro-batch's sequences, and its number, to their losses."""
        device, parts = self.engine.device, self.accumulation
        if self.objective == "reward":
            return lambda values, micro: reward_model(values, self.square)
        references = self._references(batch).chunk(parts)
        if self.objective == "kto":
            assert batch.rewards is not None
            wanted = to_device(torch.from_numpy(batch.rewards) > 0, device).chunk(parts)
            return lambda values, micro: kto(values, references[micro], wanted[micro], self.settings)
        lengths = to_device(torch.from_numpy(batch.loss_mask.sum(axis=1)), device).chunk(parts)
        return lambda values, micro: dpo(values, references[micro], lengths[micro], self.settings)

    def _references(self, batch: Batch) -> Tensor:
        """Log-probability of each sequence by the reference model: as it was stored, or computed."""
        if self.objective == "dpo" and self.settings.reference_free:
            return torch.zeros(len(batch.tokens), device=self.engine.device)
        if batch.references is not None:
            return to_device(torch.from_numpy(batch.references), self.engine.device)
        assert self.reference is not None
        with self.reference.evaluating():
            return self.reference.each_sequence(Rows.of(batch))


class _Tally:
    """Sums for the report, kept on the device until it is made."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # name -> [sum, number]

    def add(self, judged: Judged) -> None:
        rewards, wanted = judged.rewards, judged.wanted
        self._add("chosen_reward", rewards, wanted)
        self._add("rejected_reward", rewards, ~wanted)
        self._add("accuracy", judged.right.float(), torch.ones_like(judged.right))
        if judged.kl is not None:
            self._add("kl", judged.kl, torch.ones_like(wanted))

    def _add(self, name: str, values: Tensor, counted: Tensor) -> None:
        """`counted`: bool, of which values. To select them would be to wait for the device, which knows how many."""
        found = torch.stack([values.where(counted, 0).sum(dtype=torch.float64), counted.sum(dtype=torch.float64)])
        self.sums[name] = self.sums[name] + found if name in self.sums else found

    def means(self, engine: Executor) -> dict[str, float]:
        """Over all ranks; what no sequence of the step tells anything about is left out."""
        rows = torch.stack(list(self.sums.values())).tolist()
        totals = {n: [engine.sum_over_data(v) for v in row] for n, row in zip(self.sums, rows, strict=True)}
        means = {name: total / number for name, (total, number) in totals.items() if number}
        if {"chosen_reward", "rejected_reward"} <= means.keys():
            means["margin"] = means["chosen_reward"] - means["rejected_reward"]
        return means
