"""What to ask of a model. Needs no lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TaskOptions:
    """What to run. `tasks`: names of lm-eval, of the group `castalia_demo`, or YAML files."""

    tasks: tuple[str, ...]
    shots: int | None = None  # examples before each question; None: as the task says
    limit: int | None = None  # documents of each task, the first ones; None: all
    chat: bool = False  # ask in the tokenizer's chat template, examples as earlier turns
    samples: bool = False  # keep every request and answer in the results
    unsafe_code: bool = False  # run tasks that execute what the model writes
    draws: int = 100_000  # of documents, for the standard errors of metrics without a formula; 0: none


def names_of(tasks: Sequence[str]) -> tuple[str, ...]:
    """Tasks from a list of which each part may hold several, separated by commas."""
    return tuple(name.strip() for part in tasks for name in part.split(",") if name.strip())
