"""The learning rate that a run follows, and the steps at which it saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from castalia.config.lr_schedule import COOLDOWN, STORED_NAMES, LearningRate
from castalia.config.schema import CheckpointConfig, RunConfig
from castalia.errors import TrainingError


def learning_rate(config: RunConfig, steps: int, release: str | None = None) -> LearningRate:
    """The schedule that the config describes for a run of `steps` optimizer steps."""
    schedule = config.schedule
    end = schedule.decay_end(steps)
    return LearningRate(
        peak=config.optimizer.lr,
        minimum=schedule.min_lr,
        warmup=schedule.warmup_length(end),
        end=end,
        style=schedule.style,
        cooldown=schedule.cooldown * end if schedule.style == "wsd" else 0.0,
        release=release,
    )


def resumed_learning_rate(
    configured: LearningRate, stored: Mapping[str, Any] | None, choice: str | None
) -> LearningRate:
    """The schedule of a resumed run: the config's or the checkpoint's, as `choice` (checkpoint.schedule_from) says.

    Raises TrainingError if the two differ and `choice` is None.
    """
    if not stored or choice == "config":
        return configured
    # The names are those of GPT-NeoX's checkpoints; a value that they lack comes from the config.
    known = {field: stored[name] for field, name in (STORED_NAMES | COOLDOWN).items() if name in stored}
    restored = replace(configured, **known)
    if restored == configured or choice == "checkpoint":
        return restored
    differences = ", ".join(
        f"{field} {value} -> {getattr(configured, field)}"
        for field, value in known.items()
        if value != getattr(configured, field)
    )
    raise TrainingError(
        "the config's learning-rate schedule is not that of the checkpoint "
        f"(checkpoint -> config: {differences}); "
        "set checkpoint.schedule_from=config to follow the config from here on, or =checkpoint to keep the old one"
    )


def is_save_step(checkpoint: CheckpointConfig, step: int, last: int) -> bool:
    """Whether to save once `step` steps are done. The last step of a run is always saved."""
    if step in checkpoint.steps or step == last:
        return True
    if step == 0:  # a multiple of every interval, but saved only where checkpoint.steps names it
        return False
    if checkpoint.every and step % checkpoint.every == 0:
        return True
    if checkpoint.log_base is None or step > (checkpoint.log_until or step):
        return False
    # The base need not be whole: powers are rounded down.
    power = 1.0
    while int(power) < step:
        power *= checkpoint.log_base
    return int(power) == step
