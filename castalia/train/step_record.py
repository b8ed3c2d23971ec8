"""What is recorded of each step, and the speed that it is measured against."""

from __future__ import annotations

from castalia.checkpoint.tensors import Progress
from castalia.observe.layer_stats import expert_shares
from castalia.plan.flops import peak_tokens_per_second
from castalia.train.hardware import peak_flops
from castalia.train.setup import Session
from castalia.train.step import StepResult


def step_record(session: Session, progress: Progress, result: StepResult, seconds: float) -> dict[str, float | int]:
    """The record of the step that `progress` includes as its last, as metrics.jsonl holds it."""
    record = {
        "step": progress.step,
        "loss": result.loss,
        "lr": result.lr,
        "grad_norm": result.grad_norm,
        "tokens": progress.tokens,
        "tokens_per_second": round(session.tokens_of(progress.step - 1) / seconds, 1),
        "seconds": round(seconds, 6),
    }
    if session.step.preference:
        record |= session.step.preference.report
    if session.step.loss_scale is not None:
        record["loss_scale"] = session.step.loss_scale
    if session.config.model.experts and progress.step % session.config.log.every == 0:  # a message between the ranks
        shares = expert_shares(session.executor)
        # The largest share over the mean one, and experts without a token, in the worst layer and in all.
        record["expert_imbalance"] = round(max(max(each) * len(each) for each in shares.values()), 4)
        record["idle_experts"] = sum(not share for each in shares.values() for share in each)
    # Runs that skip nothing need no column for it.
    if session.step.loss_scale is not None or progress.skipped:
        record["skipped"] = progress.skipped
    return record


def peak_speed(session: Session) -> float | None:
    """Tokens per second of the whole run at the peak matmul rate of all its devices, one for each rank.

    None where the peak rate of the device is unknown.
    """
    tflops = session.config.log.peak_tflops
    peak = tflops * 1e12 if tflops else peak_flops(session.device, session.dtype)
    model, length = session.config.model, session.config.data.seq_length
    return peak_tokens_per_second(model, length, session.executor.world, peak) if peak else None
