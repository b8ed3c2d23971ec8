"""One optimizer step: micro-batches, global-token loss, loss scale, clipping, non-finite policy, update."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from castalia.config.batch import BatchPlan
from castalia.config.schema import Warmup
from castalia.data.loader import Batch
from castalia.errors import TrainingError
from castalia.observe.watch import first_cause
from castalia.parallel.compile import eager_before
from castalia.parallel.executor import Counted, Executor, Rows
from castalia.train.optimizer import LossScaler, set_rate
from castalia.train.schedule import LearningRate
from castalia.train.update_rules import AnyOptimizer

if TYPE_CHECKING:
    from castalia.train.preference import PreferenceLoss

MAX_SKIPPED_IN_A_ROW = 50
Judge = Callable[[float, float], bool]  # of a step's loss and gradient norm: whether they may change the model


class StepResult(NamedTuple):
    loss: float
    grad_norm: float  # before clipping
    lr: float
    applied: bool  # False where an fp16 overflow or a judge left the update out


class TrainStep:
    """Owns what changes from step to step besides model and optimizer: the counters and the loss scale.

    The loss is the sum over all tokens of the global batch over their number; `micro_batch_means` takes the original's
    mean of micro-batch means instead, `preference` other losses altogether. `gradient_factor` multiplies gradients, but
    not the loss that is reported.
    """

    def __init__(
        self,
        engine: Executor,
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
        counted_in_norm: Counted | None = None,
    ):
        self.engine, self.optimizer, self.rate, self.plan = engine, optimizer, rate, plan
        self.seed, self.clip_norm, self.scaler = seed, clip_norm, scaler
        self.micro_batch_means, self.gradient_factor = micro_batch_means, gradient_factor
        self.skipped, self.preference, self.batch_warmup = skipped, preference, batch_warmup
        self.counted_in_norm = counted_in_norm  # what clipping takes the norm of; None: all gradients
        self.skipped_in_a_row, self.first_compiled = 0, first_compiled

    def __call__(self, step: int, batch: Batch, judge: Judge = lambda loss, norm: True) -> StepResult:
        """Trains on this data rank's part of the batch of `step` (from 0).

        `judge` is called on all ranks once the gradients are complete; where it says no the update is left out.
        Raises TrainingError, on all ranks, where it says yes though loss or gradients are not finite.
        """
        lr = self.rate(step - self.skipped)
        scale = self.scaler.scale if self.scaler else 1.0
        with eager_before(self.first_compiled, step):
            loss_tensor = self._forward_backward(step, batch, scale)
        norm_tensor = self.engine.gradient_norm()
        clipped_tensor = self.engine.gradient_norm(self.counted_in_norm) if self.counted_in_norm else norm_tensor
        # The step's only wait for the device.
        loss, norm, clipped = self.engine.numbers(loss_tensor, norm_tensor, clipped_tensor)
        if self.preference:
            self.preference.make_report()
        norm, clipped = norm / scale, clipped / scale
        finite = math.isfinite(loss) and math.isfinite(norm)
        wanted = judge(loss, norm)
        if finite and wanted:
            clip = max(1.0, (clipped + 1e-6) / self.clip_norm) if self.clip_norm else 1.0
            gradients = self.engine.gradients()
            if gradients and scale * clip != 1.0:  # a pipeline stage may train nothing
                torch._foreach_mul_(gradients, 1.0 / (scale * clip))
            set_rate(self.optimizer, lr)
            self.optimizer.step()
        elif wanted and self.scaler is None:
            raise TrainingError(self._explain(step, batch, loss))
        self.optimizer.zero_grad(set_to_none=True)
        self._count(step, finite, finite and wanted)
        return StepResult(loss, norm, lr, finite and wanted)

    def _forward_backward(self, step: int, batch: Batch, scale: float) -> torch.Tensor:
        """Leaves scaled gradients of the loss in the parameters; returns the loss, unscaled, on the device."""
        plan, ranks = self.plan.at(step, self.batch_warmup), self.engine.data_size
        seeds = [dropout_seed(self.seed, step, micro, self.engine.data_rank) for micro in range(plan.accumulation)]
        if self.preference:
            return self.preference.forward_backward(batch, scale * self.gradient_factor, seeds)
        counts = batch.loss_mask.sum(axis=1)  # tokens with a loss, by sequence
        everywhere = self.engine.sum_over_data(float(counts.sum()))
        if not everywhere:
            raise TrainingError(f"step {step + 1}: every label of the batch is masked, there is nothing to learn from")
        if self.micro_batch_means:
            denominators = counts.reshape(plan.accumulation, -1).sum(axis=1) * (plan.accumulation * ranks)
            weights = [1.0 / float(count) for count in denominators]
        else:
            weights = [1.0 / everywhere] * plan.accumulation
        return self.engine.forward_backward(Rows.of(batch), weights, scale * self.gradient_factor, seeds)

    def _count(self, step: int, finite: bool, applied: bool) -> None:
        if self.scaler:
            self.scaler.update(overflow=not finite)
        self.skipped += not applied
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row, up to step {step + 1}, overflowed or were spikes and were "
                "skipped; train in bf16 (precision.compute=bf16) or lower optimizer.lr"
            )

    def _explain(self, step: int, batch: Batch, loss: float) -> str:
        cause = first_cause(self.engine.models, loss, lambda: self._forward_backward(step, batch, 1.0))
        everyone = self.engine.gather(cause)
        first = min(everyone)
        where = f" on rank {everyone.index(first)}" if self.engine.world > 1 else ""
        return (
            f"step {step + 1} is not finite (loss {loss:g}): the first bad tensor is {first.what}{where}. The weights "
            f"are those of step {step} and the run's events.jsonl names the data; lower optimizer.lr, or look at the "
            f"data with `castalia data batch CONFIG --step {step}`"
        )


def dropout_seed(seed: int, step: int, micro: int, rank: int = 0) -> int:
    """One generator seed for each micro-batch of each data rank, so that no generator state need be stored."""
    digest = hashlib.blake2b(f"{seed}:{step}:{micro}:{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
