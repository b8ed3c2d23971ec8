"""Averages of checkpoints: equal or given weights, or exponentially falling ones. Read and written piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from castalia.checkpoint.convert import prepare
from castalia.checkpoint.file_plan import OutputFile, json_output
from castalia.checkpoint.tensors import Checkpoint, Progress
from castalia.errors import CheckpointError, ConfigError
from castalia.examine.diff import model_settings
from castalia.storage.derived import Cast, Weighted
from castalia.storage.lazy import TensorRef

ORIGIN = "average.json"  # beside the weights: what they are the average of


def ema_shares(decay: float, count: int) -> list[float]:
    """The shares of so many checkpoints, in order, in their exponential moving average, which begins with the first."""
    return [decay ** (count - 1), *((1 - decay) * decay ** (count - 1 - number) for number in range(1, count))]


def shares_of(count: int, given: Sequence[float] | None, decay: float | None) -> list[float]:
    """The share of each checkpoint, which add up to 1. Raises ConfigError for weights that do not fit."""
    if given is not None and decay is not None:
        raise ConfigError("--weights and --ema exclude each other")
    if decay is not None:
        return ema_shares(decay, count)
    weights = list(given) if given is not None else [1.0] * count
    if len(weights) != count or sum(weights) == 0:
        raise ConfigError(f"--weights: {count} checkpoints need {count} weights whose sum is not 0, not {weights}")
    return [weight / sum(weights) for weight in weights]


def averaged(checkpoints: Sequence[Checkpoint], shares: Sequence[float], dtype: torch.dtype | None) -> Checkpoint:
    """The checkpoint whose weights are the sum of the others' times their shares. Nothing is read yet.

    Sums are computed in fp64, from fp32 masters where there are any. `dtype`: of the result; None: that of the weights.
    The rest is that of the last one, without optimizer state. Raises CheckpointError for models that differ.
    """
    for other in checkpoints[1:]:
        _refuse_other(checkpoints[0], other)
    last, parts = checkpoints[-1], [prepare(each, torch.float32, optimizer=False) for each in checkpoints]
    model: dict[str, TensorRef] = {}
    for name, ref in last.model.items():
        mean = Weighted(tuple(part.model[name] for part in parts), tuple(shares))
        kind = ref.dtype if dtype is None else dtype
        model[name] = mean if kind == torch.float32 else Cast(mean, str(kind).removeprefix("torch."))
    progress = Progress(step=last.progress.step, skipped=last.progress.skipped, tokens=last.progress.tokens)
    return replace(last, model=model, optimizer=None, progress=progress)


def _refuse_other(one: Checkpoint, other: Checkpoint) -> None:
    shapes = [{name: tuple(ref.shape) for name, ref in each.model.items()} for each in (one, other)]
    if shapes[0] != shapes[1]:
        differing = sorted(name for name in shapes[0].keys() | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
        raise CheckpointError(
            f"{one.path} and {other.path} are different models: {len(differing)} tensors differ in shape or are in one "
            f"alone, {differing[0]} first"
        )
    models = [each.config.model if each.config else None for each in (one, other)]
    if models[0] and models[1] and model_settings(models[0]) != model_settings(models[1]):
        left, right = model_settings(models[0]), model_settings(models[1])
        key = next(key for key in left if left[key] != right.get(key))
        raise CheckpointError(
            f"{one.path} and {other.path} compute differently: {key} is {left[key]} and {right.get(key)}"
        )


def origin_of(checkpoints: Sequence[Checkpoint], shares: Sequence[float]) -> dict[str, list[dict[str, Any]]]:
    """What the weights are the average of."""
    sources = [
        {"path": each.path, "step": each.progress.step, "share": share}
        for each, share in zip(checkpoints, shares, strict=True)
    ]
    return {"average_of": sources}


def origin_output(checkpoints: Sequence[Checkpoint], shares: Sequence[float]) -> OutputFile:
    """The file that tells what the weights are the average of."""
    return json_output(ORIGIN, origin_of(checkpoints, shares))
