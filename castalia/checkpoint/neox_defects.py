"""What the original's defects leave in a state that it trained, or that a run trained which follows them."""

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

FIRST_SUMMING = (0, 16)  # DeepSpeed's release from which a pipeline engine adds up what it should average
# What is carried on, and what it is where there is nothing of it.
INHERITED: Mapping[str, Any] = {
    "release": None, "summed_bias_ranks": 1, "summed_micro_batches": 1, "norm_ranks": (1, 1),
}  # fmt: skip

Count = Annotated[int, Field(gt=0, le=LARGEST)]
NOTED = keys(
    {
        "release": str | None,
        "summed_bias_ranks": Count,
        "summed_micro_batches": Count,
        "norm_ranks": tuple[Count, Count] | Annotated[list[Count], Field(min_length=2, max_length=2)],
    }
)


def clip_norm_of(checkpoint: Checkpoint) -> float | None:
    """The norm that the checkpoint's run clipped to."""
    assert checkpoint.config is not None
    return effective_clip_norm(checkpoint.config.optimizer.clip_norm, checkpoint.release)


def summed_micro_batches(version: object, pipeline: bool, config: RunConfig | None, dp: int) -> int:
    """How many micro-batches' gradients DeepSpeed of this version added up, where their mean was meant; 1: the mean.

    Its pipeline engine, which layer files come from, switches the engine's own reduction off, and since 0.16 the
    division by the number of micro-batches with it (`DeepSpeedEngine._backward_prologue`).
    """
    release = tuple(int(number) for number in re.findall(r"\d+", str(version or "0"))[:2])
    if not pipeline or release < FIRST_SUMMING or config is None:
        return 1
    try:
        return batch_plan(config, dp).accumulation
    except ConfigError:  # files whose config does not tell the batch
        return 1


def take_inherited(
    progress: Progress, stored: Mapping[str, Any], config: RunConfig | None
) -> tuple[Progress, dict[str, Any]]:
    """What a conversion `stored`, or a run that follows the original noted in its schedule, which is freed of it."""
    schedule: dict[str, Any] = dict(progress.schedule or {})
    found = {name: schedule.pop(name, stored.get(name, neutral)) for name, neutral in INHERITED.items()}
    found = typed(found, "what the checkpoint notes of the original", CheckpointError, NOTED)
    found["norm_ranks"] = tuple(found["norm_ranks"])  # a list in JSON
    noted = dict(progress.schedule or {})
    if noted.get("release") == "head" and "summed_micro_batches" not in noted and config and config.model:
        # our own checkpoints did not note the number at first; a model made in one pass has the pipeline engine
        dp = planned_dp(config) or 1
        found["summed_micro_batches"] = batch_plan(config, dp).accumulation if config.model.init_passes == 1 else 1
    return replace(progress, schedule=schedule or None), found


def with_micro_batches(checkpoint: Checkpoint, number: int) -> Checkpoint:
    """The same state for an engine that sums `number` micro-batches: gradients, and so Adam's first moment, grow with
    the number, the second moment with its square."""
    from castalia.storage.lazy import Scaled  # imports torch

    old = checkpoint.summed_micro_batches
    if number == old:
        return checkpoint
    state: Any = checkpoint.optimizer  # of whatever optimizer
    powers = {"exp_avg": 1, "exp_avg_sq": 2}
    scaled = state and {
        name: {
            kind: Scaled(ref, old ** powers[kind], number ** powers[kind]) if kind in powers else ref
            for kind, ref in each.items()
        }
        for name, each in state.items()
    }
    return replace(checkpoint, optimizer=scaled, summed_micro_batches=number)


def micro_batches_note(before: Checkpoint, number: int) -> str:
    old = before.summed_micro_batches
    if number == old or before.optimizer is None:
        return ""
    factor = f"{number}/{old}" if old > 1 else f"{number}"
    return (
        f"Adam's moments are multiplied by {factor} and its square: a pipeline engine of DeepSpeed 0.16 and later sums "
        f"a step's micro-batches, now {number}, where their mean is meant"
    )
