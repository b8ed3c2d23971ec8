"""Preference tuning: DPO, KTO, ORPO and reward models, as losses of one number for each sequence.

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
from castalia.model.loss import IGNORE
from castalia.model.sums import sum_dtype
from castalia.parallel.executor import Executor, Rows, to_device


class PreferenceLosses(NamedTuple):
    """The losses of a micro-batch, and what is reported about them."""

    losses: Tensor  # [pairs], of KTO [sequences]
    rewards: Tensor  # [sequences]
    wanted: Tensor  # bool [sequences]: preferred, or desirable
    right: Tensor  # bool [pairs], of KTO [sequences]: whether the rewards agree with the data
    kl: Tensor | None = None  # of KTO


def dpo(logps: Tensor, references: Tensor, num_tokens: Tensor, cfg: PreferenceConfig) -> PreferenceLosses:
    """Direct preference optimization (2305.18290), or IPO (2310.12036).

    All tensors are [sequences]: log-probabilities by the model and by the reference model, and `num_tokens`, the number
    of labels over which IPO averages.
    """
    ratios = logps - references
    rewards = cfg.beta * ratios.detach()
    if cfg.loss == "ipo":
        chosen, rejected = _sides(ratios / num_tokens)
        losses = (chosen - rejected - 1 / (2 * cfg.beta)) ** 2
    else:
        chosen, rejected = _sides(ratios)
        losses = -F.logsigmoid(cfg.beta * (chosen - rejected))
    return PreferenceLosses(losses, rewards, _first_of_two(rewards), _in_order(rewards))


def reward_model(rewards: Tensor, square: float) -> PreferenceLosses:
    """The Bradley-Terry loss: the preferred text should get the higher reward. `square` weights the squared rewards."""
    chosen, rejected = _sides(rewards)
    losses = -F.logsigmoid(chosen - rejected) + square * (chosen**2 + rejected**2)
    known = rewards.detach()
    return PreferenceLosses(losses, known, _first_of_two(known), _in_order(known))


def orpo(
    logps: Tensor, whole: Tensor, num_tokens: Tensor, whole_share: float, cfg: PreferenceConfig
) -> PreferenceLosses:
    """Odds ratio preference optimization (2403.07691), which needs no reference model.

    All tensors are [sequences]: log-probabilities of the answers, and of the `whole` texts with the questions, as in
    the authors' code and TRL; `num_tokens` of the answers. `whole_share`, a number, weights the whole texts' losses so
    that their mean over the pairs is a mean over their tokens.
    """
    means = logps / num_tokens
    odds_chosen, odds_rejected = _sides(means - _log_of_rest(means))  # log(p / (1 - p))
    chosen, _ = _sides(whole)
    losses = -chosen * whole_share - cfg.beta * F.logsigmoid(odds_chosen - odds_rejected)
    rewards = cfg.beta * means.detach()
    return PreferenceLosses(losses, rewards, _first_of_two(rewards), _in_order(rewards))


def _log_of_rest(log_p: Tensor) -> Tensor:
    """log(1 - p), exact for p near 0 and near 1."""
    near_one = log_p > -0.6931472  # ln 2: from here on expm1 is the exact one
    # Both sides of `where` get gradients, so neither may see values at which it is not finite.
    large, small = log_p.where(near_one, -0.5), log_p.where(~near_one, -1.0)
    return torch.where(near_one, (-torch.expm1(large)).log(), torch.log1p(-small.exp()))


def kto(logps: Tensor, references: Tensor, wanted: Tensor, cfg: PreferenceConfig) -> PreferenceLosses:
    """Kahneman-Tversky optimization (2402.01306) of a micro-batch [sequences]; `wanted` are the desirable ones.

    A reward is compared with an estimate of the divergence from the reference model. As in GPT-NeoX, each half of the
    micro-batch takes the mean log-ratio of the other half for it, clamped at 0. Raises DataError for one sequence.
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
    return PreferenceLosses(losses, rewards, wanted, rewards * sign > 0, kl)


def _sides(values: Tensor) -> tuple[Tensor, Tensor]:
    return values[0::2], values[1::2]


def _first_of_two(values: Tensor) -> Tensor:
    return torch.arange(len(values), device=values.device) % 2 == 0


def _in_order(rewards: Tensor) -> Tensor:
    chosen, rejected = _sides(rewards)
    return chosen > rejected


class PreferenceLoss:
    """The objective of a run that learns from preferences.

    `reference` is the frozen model, on the ranks of `executor`; None where the objective asks none.
    """

    def __init__(self, config: RunConfig, executor: Executor, reference: Executor | None, accumulation: int) -> None:
        self.objective, self.settings, self.square = config.train.objective, config.preference, config.train.z_loss
        self.executor, self.reference, self.accumulation = executor, reference, accumulation
        self.tally = _Tally()
        self.report: dict[str, float] = {}  # of the last step

    def forward_backward(self, batch: Batch, scale: float, seeds: list[int]) -> Tensor:
        """As `Executor.forward_backward`, for the mean loss of the step. `make_report` then collects its figures."""
        loss_of, self.tally = self._loss_function(batch), _Tally()

        def losses(values: Tensor, micro: int) -> Tensor:
            result = loss_of(values, micro)
            self.tally.add(result)
            return result.losses.sum()

        number = self.executor.sum_over_data(self._num_losses(batch))
        return self.executor.forward_backward(Rows.of(batch), [1 / number] * self.accumulation, scale, seeds, losses)

    def make_report(self) -> None:
        """Fills `report` with the step's figures, on all ranks together. Waits for the device, so it is called last."""
        self.report = self.tally.means(self.executor)

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean loss and rewards over all ranks, given this data rank's rows of batches."""
        device, number = self.executor.device, 0.0
        tally, total = _Tally(), torch.zeros((), dtype=sum_dtype(device), device=device)
        with self.executor.evaluating():
            for batch in batches:
                loss_of = self._loss_function(batch)
                for micro, values in enumerate(self.executor.each_sequence(Rows.of(batch)).chunk(self.accumulation)):
                    result = loss_of(values, micro)
                    tally.add(result)
                    total += result.losses.sum()
                number += self._num_losses(batch)
        loss = self.executor.sum_over_data(float(total)) / self.executor.sum_over_data(number)
        return {"loss": loss} | tally.means(self.executor)

    def _num_losses(self, batch: Batch) -> float:
        return len(batch.tokens) / (1 if self.objective == "kto" else 2)

    def _loss_function(self, batch: Batch) -> Callable[[Tensor, int], PreferenceLosses]:
        """The loss of a micro-batch as a function of its sequences' values and its number."""
        device, parts = self.executor.device, self.accumulation
        if self.objective == "reward":
            return lambda values, micro: reward_model(values, self.square)
        if self.objective == "orpo":
            return self._orpo_function(batch)
        references = self._references(batch).chunk(parts)
        if self.objective == "kto":
            assert batch.rewards is not None
            wanted = to_device(torch.from_numpy(batch.rewards) > 0, device).chunk(parts)
            return lambda values, micro: kto(values, references[micro], wanted[micro], self.settings)
        lengths = to_device(torch.from_numpy(batch.loss_mask.sum(axis=1)), device).chunk(parts)
        return lambda values, micro: dpo(values, references[micro], lengths[micro], self.settings)

    def _orpo_function(self, batch: Batch) -> Callable[[Tensor, int], PreferenceLosses]:
        assert batch.whole is not None
        device, parts = self.executor.device, self.accumulation
        lengths = to_device(torch.from_numpy(batch.loss_mask.sum(axis=1)), device).chunk(parts)
        counted = float((batch.whole[0::2] != IGNORE).sum())  # tokens of the preferred texts of this data rank
        share = self.executor.sum_over_data(self._num_losses(batch)) / self.executor.sum_over_data(counted)
        return lambda values, micro: orpo(values[:, 0], values[:, 1], lengths[micro], share, self.settings)

    def _references(self, batch: Batch) -> Tensor:
        """The reference model's log-probability of each sequence: stored with the data, or computed."""
        if self.objective == "dpo" and self.settings.reference_free:
            return torch.zeros(len(batch.tokens), device=self.executor.device)
        if batch.references is not None:
            return to_device(torch.from_numpy(batch.references), self.executor.device)
        assert self.reference is not None
        with self.reference.evaluating():
            return self.reference.each_sequence(Rows.of(batch))


class _Tally:
    """Sums for the report, kept on the device until the report is made."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # name -> [sum, number]

    def add(self, result: PreferenceLosses) -> None:
        """Add the results of one micro-batch to the sums."""
        rewards, wanted = result.rewards, result.wanted
        self._add("chosen_reward", rewards, wanted)
        self._add("rejected_reward", rewards, ~wanted)
        self._add("accuracy", result.right.float(), torch.ones_like(result.right))
        if result.kl is not None:
            self._add("kl", result.kl, torch.ones_like(wanted))

    def _add(self, name: str, values: Tensor, counted: Tensor) -> None:
        """`counted` masks the values. Selecting them instead would make the host wait for their number."""
        dtype = sum_dtype(values.device)
        sums = torch.stack([values.where(counted, 0).sum(dtype=dtype), counted.sum(dtype=dtype)])
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums

    def means(self, executor: Executor) -> dict[str, float]:
        """Means over all ranks. A figure to which no sequence of the step contributes is left out."""
        rows = torch.stack(list(self.sums.values())).tolist()
        totals = {n: [executor.sum_over_data(v) for v in row] for n, row in zip(self.sums, rows, strict=True)}
        means = {name: total / number for name, (total, number) in totals.items() if number}
        if {"chosen_reward", "rejected_reward"} <= means.keys():
            means["margin"] = means["chosen_reward"] - means["rejected_reward"]
        return means
