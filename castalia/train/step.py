"""One optimizer step: micro-batches, global-token loss, loss scale, clipping, non-finite policy, update."""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import nn

from castalia.config.batch import BatchPlan
from castalia.data.loader import Batch
from castalia.errors import TrainingError
from castalia.train.optimizer import LossScaler, gradient_norm, gradients, set_rate
from castalia.train.rules import AnyOptimizer
from castalia.train.schedule import LearningRate
from castalia.train.watch import first_bad_activation, first_bad_tensor

MAX_SKIPPED_IN_A_ROW = 50


class StepResult(NamedTuple):
    loss: float
    grad_norm: float  # before clipping
    lr: float
    applied: bool  # False where an fp16 overflow left the update out


class TrainStep:
    """Owns what changes from step to step besides model and optimizer: the counters and the loss scale.

    The loss is the sum over all tokens of the global batch over their number; `micro_batch_means` takes the original's
    mean of micro-batch means instead. `gradient_factor` multiplies gradients, but not the loss that is reported.
    """

    def __init__(
        self,
        model: nn.Module,
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
    ):
        self.model, self.optimizer, self.rate, self.plan = model, optimizer, rate, plan
        self.seed, self.clip_norm, self.scaler = seed, clip_norm, scaler
        self.micro_batch_means, self.gradient_factor = micro_batch_means, gradient_factor
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.skipped = skipped
        self.skipped_in_a_row = 0

    def __call__(self, step: int, batch: Batch) -> StepResult:
        """Trains on the batch of `step` (from 0). Raises TrainingError where loss or gradients are not finite."""
        lr = self.rate(step - self.skipped)
        scale = self.scaler.scale if self.scaler else 1.0
        loss_tensor = self._forward_backward(step, batch, scale)
        grads = gradients(self.parameters)
        loss, norm = torch.stack([loss_tensor, gradient_norm(grads)]).tolist()  # the step's only wait for the device
        norm /= scale
        applied = math.isfinite(loss) and math.isfinite(norm)
        if applied:
            clip = max(1.0, (norm + 1e-6) / self.clip_norm) if self.clip_norm else 1.0
            if scale * clip != 1.0:
                torch._foreach_mul_(grads, 1.0 / (scale * clip))
            set_rate(self.optimizer, lr)
            self.optimizer.step()
        elif self.scaler is None:
            raise TrainingError(self._explain(step, batch, loss))
        self.optimizer.zero_grad(set_to_none=True)
        self._count(step, applied)
        return StepResult(loss, norm, lr, applied)

    def _forward_backward(self, step: int, batch: Batch, scale: float) -> torch.Tensor:
        """Leaves scaled gradients of the loss in the parameters; returns the loss, unscaled, on the device."""
        device = self.parameters[0].device
        size = self.plan.micro_batch_size
        counts = batch.loss_mask.sum(axis=1)  # tokens with a loss, by sequence
        if not counts.sum():
            raise TrainingError(f"step {step + 1}: every label of the batch is masked, there is nothing to learn from")
        total = torch.zeros((), device=device)
        for micro in range(self.plan.accumulation):
            rows = slice(micro * size, (micro + 1) * size)
            tokens = torch.from_numpy(batch.tokens[rows]).to(device, non_blocking=True)
            labels = torch.from_numpy(batch.labels[rows]).to(device, non_blocking=True)
            denominator = counts[rows].sum() * self.plan.accumulation if self.micro_batch_means else counts.sum()
            torch.manual_seed(dropout_seed(self.seed, step, micro))
            documents = None if batch.documents is None else torch.from_numpy(batch.documents[rows]).to(device)
            loss_sum, _ = self.model(tokens, labels=labels, documents=documents)
            (loss_sum * (scale * self.gradient_factor / float(denominator))).backward()
            total += loss_sum.detach() / float(denominator)
        return total

    def _count(self, step: int, applied: bool) -> None:
        if self.scaler:
            self.scaler.update(overflow=not applied)
        self.skipped += not applied
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row, up to step {step + 1}, overflowed and were skipped; "
                "train in bf16 (precision.compute=bf16) or lower optimizer.lr"
            )

    def _explain(self, step: int, batch: Batch, loss: float) -> str:
        culprit = first_bad_tensor(self.model, loss)
        if culprit == "the loss":
            micro_batches = torch.from_numpy(batch.tokens).split(self.plan.micro_batch_size)
            module = first_bad_activation(self.model, micro_batches)
            culprit += f", after the output of {module}" if module else ""
        return (
            f"step {step + 1} is not finite (loss {loss:g}): the first bad tensor is {culprit}. The weights are those "
            f"of step {step} and the run's events.jsonl names the data; lower optimizer.lr, or look at the data with "
            f"`castalia data batch CONFIG --step {step}`"
        )


def dropout_seed(seed: int, step: int, micro: int, rank: int = 0) -> int:
    """One generator seed for each micro-batch of each data rank, so that no generator state need be stored."""
    digest = hashlib.blake2b(f"{seed}:{step}:{micro}:{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
