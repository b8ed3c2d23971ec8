"""Finding where a run went wrong."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn


class Cause(NamedTuple):
    """What went wrong on a rank; the smallest of all ranks' came first."""

    order: tuple[int, int, int]
    what: str


def first_cause(models: Sequence[nn.Module], loss: float, again: Callable[[], object]) -> Cause:
    """Names the first tensor that is not finite, in the order of cause and effect: parameters, loss, gradients.

    `again` computes the step once more, so that one can see which activation was the first.
    """
    parameters = [named for model in models for named in model.named_parameters()]
    gradients = {name: parameter.grad for name, parameter in reversed(parameters)}  # as backward goes
    bad = next((name for name, grad in gradients.items() if grad is not None and not _is_finite(grad)), None)
    with first_bad_activation(models) as found:
        again()
    for name, parameter in parameters:
        if not _is_finite(parameter):
            return Cause((0, 0, 0), f"the parameter {name}")
    if found and not math.isfinite(loss):
        block, done, module = found[0]
        return Cause((1, block, done), f"the loss, after the output of {module}")
    if not math.isfinite(loss):
        return Cause((2, 0, 0), "the loss")
    if bad:
        return Cause((3, 0, 0), f"the gradient of {bad}")
    return Cause((4, 0, 0), "none by itself: the norm of all gradients overflows")


def _is_finite(tensor: Tensor) -> bool:
    """Of a sharded tensor this rank's part counts."""
    return bool(getattr(tensor, "_local_tensor", tensor).isfinite().all())


@contextmanager
def first_bad_activation(models: Sequence[nn.Module]) -> Iterator[list[tuple[int, int, str]]]:
    """Watches forward passes; afterwards the list tells the first module whose output is not finite, or is empty.

    Block (-1 before the first), modules that were done before, name: the smallest of all ranks' is where it began.
    """
    found: list[tuple[int, int, str]] = []
    calls = itertools.count()

    def look(name: str) -> Callable[..., None]:
        block = re.match(r"blocks\.(\d+)", name)
        place = int(block[1]) if block else -1 if name in ("embed", "positions") else sys.maxsize

        def hook(module: nn.Module, args: object, output: object) -> None:
            done = next(calls)
            if not found and isinstance(output, Tensor) and not _is_finite(output):
                found.append((place, done, name))

        return hook

    named = [(name, module) for model in models for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(look(name)) for name, module in named]
    yield found
    for handle in handles:
        handle.remove()
