"""One optimizer step: micro-batches, loss over all tokens of the global batch, loss scale, clipping, update.

Without ranks, loss scale and spikes, a step is these lines:

    batch = samples.batch(step)                        # tokens, labels, loss_mask: [sequences, time]   data/loader
    total = batch.loss_mask.sum()                      # tokens that have a loss, in the whole batch
    for tokens, labels in micro_batches(batch):        # what fits into memory at a time
        torch.manual_seed(dropout_seed(step, micro_batch))  # dropout repeats itself when the step is repeated
        loss_sum, _ = model(tokens, labels=labels)     # forward: the sum over tokens              model/transformer
        (loss_sum / total).backward()                  # gradients of micro-batches add up        parallel/executor
    norm = total_norm(gradients)                       # over all ranks
    scale(gradients, min(1, clip_norm / norm))         # clipping
    for group in optimizer.param_groups:
        group["lr"] = rate(step)                       # warm-up, then decay                           train/schedule
    optimizer.step()                                   # AdamW: moments, then weights                 train/optimizer
    optimizer.zero_grad()

`TrainStep.gradients` goes down to the norm, `TrainStep.apply` does the rest; between them the loop may decide that an
update is left out (observe/watch).
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from castalia.config.batch import BatchPlan
from castalia.config.schema import Warmup
from castalia.data.loader import Batch
from castalia.errors import TrainingError
from castalia.observe.layer_stats import forget_loads
from castalia.observe.watch import first_cause
from castalia.parallel.compile import eager_before
from castalia.parallel.executor import Executor, NormSubset, Objective, Rows
from castalia.train.balance import move_biases
from castalia.train.loss_scale import LossScaler
from castalia.train.optimizer import set_rate
from castalia.train.schedule import LearningRate
from castalia.train.update_rules import AnyOptimizer

if TYPE_CHECKING:
    from castalia.train.preference import PreferenceLoss
    from castalia.train.recomputing import Recomputing

MAX_SKIPPED_IN_A_ROW = 50


class StepResult(NamedTuple):
    """What a step is recorded by."""

    loss: float  # mean over the tokens of the global batch
    grad_norm: float  # before clipping, without the loss scale
    lr: float
    applied: bool  # False where the update was left out: an fp16 overflow, or a spike


class _Gradients(NamedTuple):
    """A step between its backward pass and its update."""

    step: int  # from 0
    batch: Batch
    loss: float
    norm: float
    clipped_norm: float  # the norm that clipping goes by
    lr: float

    @property
    def finite(self) -> bool:
        """Whether loss and gradient norm are both finite."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class TrainStep:
    """One optimizer step in two halves: `gradients`, then `apply` or `skip`. Calling it does both.

    It owns what changes from step to step besides model and optimizer: the number of skipped steps and the loss scale.
    The loss is the sum over all tokens of the global batch divided by their number. `micro_batch_means` takes
    GPT-NeoX's mean of micro-batch means instead, `preference` another objective. `gradient_factor` multiplies the
    gradients but not the reported loss. All methods are called on all ranks together.
    """

    def __init__(
        self,
        executor: Executor,
        optimizer: AnyOptimizer,
        rate: LearningRate,
        plan: BatchPlan,
        *,
        seed: int,
        clip_norm: float | None,
        scaler: LossScaler | None = None,
        micro_batch_means: bool = False,
        gradient_factor: int = 1,
        skipped: int = 0,
        preference: PreferenceLoss | None = None,
        batch_warmup: Warmup | None = None,
        first_compiled: int = 0,
        counted_in_norm: NormSubset | None = None,
        balance_rate: float = 0.0,
        recomputing: Recomputing | None = None,
    ):
        self.executor, self.optimizer, self.rate, self.plan = executor, optimizer, rate, plan
        self.seed, self.clip_norm, self.scaler = seed, clip_norm, scaler
        self.micro_batch_means, self.gradient_factor = micro_batch_means, gradient_factor
        self.skipped, self.preference, self.batch_warmup = skipped, preference, batch_warmup
        self.counted_in_norm = counted_in_norm  # what clipping takes the norm of; None: all gradients
        self.balance_rate, self.recomputing = balance_rate, recomputing
        self.skipped_in_a_row, self.first_compiled = 0, first_compiled
        self._pending: _Gradients | None = None

    def __call__(self, step: int, batch: Batch) -> StepResult:
        """A whole step without a spike policy: only an fp16 overflow leaves its update out."""
        loss, norm = self.gradients(step, batch)
        overflowed = self.scaler is not None and not (math.isfinite(loss) and math.isfinite(norm))
        return self.skip() if overflowed else self.apply()

    @property
    def loss_scale(self) -> float | None:
        """What the gradients of this step are multiplied by; None unless the model trains in fp16."""
        return self.scaler.scale if self.scaler else None

    def gradients(self, step: int, batch: Batch) -> tuple[float, float]:
        """Accumulates the gradients of this data rank's part of the batch of `step` (from 0).

        Returns the loss and the gradient norm before clipping, both over all ranks; either may be infinite or NaN.
        `apply` or `skip` must follow before the next step. Raises TrainingError if every label is masked.
        """
        scale = self.loss_scale or 1.0
        with eager_before(self.first_compiled, step):
            loss_tensor = self._forward_backward(step, batch, scale)
        norm_tensor = self.executor.gradient_norm()
        clipped_tensor = self.executor.gradient_norm(self.counted_in_norm) if self.counted_in_norm else norm_tensor
        # The only place where a step waits for the device.
        loss, norm, clipped = self.executor.numbers(loss_tensor, norm_tensor, clipped_tensor)
        if self.recomputing:
            self.recomputing.settle()
        if self.preference:
            self.preference.make_report()
        self._pending = _Gradients(step, batch, loss, norm / scale, clipped / scale, self.rate(step - self.skipped))
        return loss, norm / scale

    def apply(self) -> StepResult:
        """Clips the gradients and updates the weights. Raises TrainingError where loss or norm is not finite."""
        assert self._pending is not None
        pending, scale = self._pending, self.loss_scale or 1.0
        if not pending.finite:
            raise TrainingError(self._explain(pending))
        clip = max(1.0, (pending.clipped_norm + 1e-6) / self.clip_norm) if self.clip_norm else 1.0
        gradients = self.executor.gradients()
        if gradients and scale * clip != 1.0:  # a pipeline stage may train nothing
            torch._foreach_mul_(gradients, 1.0 / (scale * clip))
        set_rate(self.optimizer, pending.lr)
        self.optimizer.step()
        if self.balance_rate:
            move_biases(self.executor, self.balance_rate)
        return self._finish(applied=True)

    def skip(self) -> StepResult:
        """Drops the gradients. The learning-rate schedule, which counts updates, does not advance.

        Raises TrainingError after MAX_SKIPPED_IN_A_ROW skipped steps, and where the loss scale cannot shrink further.
        """
        return self._finish(applied=False)

    def _forward_backward(self, step: int, batch: Batch, scale: float) -> torch.Tensor:
        """Accumulates the gradients of the loss times `scale`; returns the unscaled loss, on the device."""
        forget_loads(self.executor)
        plan, ranks = self.plan.at(step, self.batch_warmup), self.executor.data_size
        seeds = [dropout_seed(self.seed, step, micro, self.executor.data_rank) for micro in range(plan.accumulation)]
        if self.preference:
            return self.preference.forward_backward(batch, scale * self.gradient_factor, seeds)
        counts = batch.loss_mask.sum(axis=1)  # [sequences]: tokens that have a loss
        global_tokens = self.executor.sum_over_data(float(counts.sum()))
        if not global_tokens:
            raise TrainingError(f"step {step + 1}: every label of the batch is masked, there is nothing to learn from")
        if self.micro_batch_means:
            # The mean over ranks and micro-batches of each one's own mean.
            denominators = counts.reshape(plan.accumulation, -1).sum(axis=1) * (plan.accumulation * ranks)
            weights = [1.0 / float(count) for count in denominators]
        else:
            weights = [1.0 / global_tokens] * plan.accumulation
        objective = None if batch.weights is None else _weighted(batch.weights, plan.accumulation, self.executor.device)
        return self.executor.forward_backward(Rows.of(batch), weights, scale * self.gradient_factor, seeds, objective)

    def _finish(self, applied: bool) -> StepResult:
        """Frees the gradients and updates the counters and the loss scale."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler:
            self.scaler.update(overflow=not pending.finite)
        self.skipped += not applied
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row, up to step {pending.step + 1}, overflowed or were spikes and "
                "were skipped; train in bf16 (precision.compute=bf16) or lower optimizer.lr"
            )
        return StepResult(pending.loss, pending.norm, pending.lr, applied)

    def _explain(self, pending: _Gradients) -> str:
        """The error text for a step that is not finite, with the first bad tensor of all ranks."""
        step, loss = pending.step, pending.loss
        cause = first_cause(self.executor, loss, lambda: self._forward_backward(step, pending.batch, 1.0))
        causes = self.executor.gather(cause)
        first = min(causes)
        where = f" on rank {causes.index(first)}" if self.executor.world > 1 else ""
        return (
            f"step {step + 1} is not finite (loss {loss:g}): the first bad tensor is {first.what}{where}. The weights "
            f"are those of step {step} and the run's events.jsonl names the data; lower optimizer.lr, or look at the "
            f"data with `castalia data batch CONFIG --step {step + 1}`"
        )


def _weighted(weights: np.ndarray, micro_batches: int, device: torch.device) -> Objective:
    """The sum of each sequence's losses times its weight [sequences], where a change of the data weights rows."""
    parts = torch.from_numpy(weights).to(device).chunk(micro_batches)
    return lambda log_probs, micro: -(log_probs * parts[micro]).sum()


def dropout_seed(seed: int, step: int, micro: int, rank: int = 0) -> int:
    """The generator seed of a micro-batch on a data rank: nothing of a generator's state has to be saved."""
    digest = hashlib.blake2b(f"{seed}:{step}:{micro}:{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
