"""Traces that defects of GPT-NeoX and DeepSpeed leave in a training state.

A checkpoint carries them if one of these programs trained it, or a run of ours that follows the defects
(`neox_exact`). Conversions carry them on, so that training continues as it would have there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from castalia.config.batch import batch_plan, planned_dp
from castalia.config.neox.clipping import effective_clip_norm
from castalia.config.schema import LARGEST, RunConfig
from castalia.errors import CheckpointError, ConfigError
from castalia.reading import keys, typed

if TYPE_CHECKING:
    from castalia.checkpoint.tensors import Checkpoint, Progress

FIRST_SUMMING = (0, 16)  # the DeepSpeed release since which a pipeline engine sums gradients that it should average
# Fields of `Checkpoint` that conversions carry on, with their values for a state without the defect.
INHERITED: Mapping[str, Any] = {
    "release": None, "summed_bias_ranks": 1, "summed_micro_batches": 1, "norm_ranks": (1, 1),
}  # fmt: skip

Count = Annotated[int, Field(gt=0, le=LARGEST)]
INHERITED_TYPES: Mapping[str, Any] = {  # as they are stored
    "release": str | None,
    "summed_bias_ranks": Count,
    "summed_micro_batches": Count,
    "norm_ranks": tuple[Count, Count] | Annotated[list[Count], Field(min_length=2, max_length=2)],
}
NOTED = keys({**INHERITED_TYPES})


def clip_norm_of(checkpoint: Checkpoint) -> float | None:
    """The norm that the checkpoint's run clipped gradients to; None: it did not clip."""
    assert checkpoint.config is not None
    return effective_clip_norm(checkpoint.config.optimizer.clip_norm, checkpoint.release)


def summed_micro_batches(version: object, pipeline: bool, config: RunConfig | None, dp: int) -> int:
    """The number of micro-batches whose gradients DeepSpeed of this version summed instead of averaging; else 1.

    Its pipeline engine, which writes layer files (`pipeline`), switches off the reduction of the base engine, and since
    version 0.16 that switches off the division by the number of micro-batches too
    (`DeepSpeedEngine._backward_prologue`).
    """
    release = tuple(int(number) for number in re.findall(r"\d+", str(version or "0"))[:2])
    if not pipeline or release < FIRST_SUMMING or config is None:
        return 1
    try:
        return batch_plan(config, dp).accumulation
    except ConfigError:  # the config beside the files does not say what the batch was
        return 1


def take_inherited(
    progress: Progress, stored: Mapping[str, Any], config: RunConfig | None
) -> tuple[Progress, dict[str, Any]]:
    """The fields of `INHERITED`, and the progress without them.

    A conversion has `stored` them; a run with `neox_exact` notes them in its schedule, from which they are removed.
    """
    schedule: dict[str, Any] = dict(progress.schedule or {})
    fields = {name: schedule.pop(name, stored.get(name, neutral)) for name, neutral in INHERITED.items()}
    fields = typed(fields, "what the checkpoint notes of the original", CheckpointError, NOTED)
    fields["norm_ranks"] = tuple(fields["norm_ranks"])  # a list in JSON
    noted = dict(progress.schedule or {})
    if noted.get("release") == "head" and "summed_micro_batches" not in noted and config and config.model:
        # Our first checkpoints did not store the number. A model that was built in one pass has the pipeline engine.
        dp = planned_dp(config) or 1
        fields["summed_micro_batches"] = batch_plan(config, dp).accumulation if config.model.init_passes == 1 else 1
    return replace(progress, schedule=schedule or None), fields


def with_micro_batches(checkpoint: Checkpoint, number: int) -> Checkpoint:
    """The checkpoint with Adam's moments scaled for an engine that sums the gradients of `number` micro-batches.

    Gradients, and so the first moment, grow with the number, the second moment with its square.
    """
    from castalia.storage.derived import Scaled  # imports torch

    old = checkpoint.summed_micro_batches
    if number == old:
        return checkpoint
    state: Any = checkpoint.optimizer  # of any optimizer
    powers = {"exp_avg": 1, "exp_avg_sq": 2}
    scaled = state and {
        name: {
            kind: Scaled(ref, old ** powers[kind], number ** powers[kind]) if kind in powers else ref
            for kind, ref in entry.items()
        }
        for name, entry in state.items()
    }
    return replace(checkpoint, optimizer=scaled, summed_micro_batches=number)


def micro_batches_note(before: Checkpoint, number: int) -> str:
    """What to tell the user where `with_micro_batches` scales moments; empty where it does not."""
    old = before.summed_micro_batches
    if number == old or before.optimizer is None:
        return ""
    factor = f"{number}/{old}" if old > 1 else f"{number}"
    return (
        f"Adam's moments are multiplied by {factor} and its square: a pipeline engine of DeepSpeed 0.16 and later sums "
        f"a step's micro-batches, now {number}, where their mean is meant"
    )
