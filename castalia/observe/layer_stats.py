"""Statistics of every layer of a model, equal in every layout: ranks add up their parts.

Every function is called on all ranks together and waits for the device once.
"""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from castalia.config.tensor_table import block_of
from castalia.model.experts import ExpertMLP
from castalia.model.sums import sum_dtype
from castalia.parallel.executor import Executor

Statistics = dict[str, dict[str, float]]
MLP_UNITS = re.compile(r"blocks\.\d+\.mlp\.up\.weight")


@torch.no_grad()
def tensor_statistics(executor: Executor, loss_scale: float = 1.0) -> dict[str, Any]:
    """Under `weights` the norm of each parameter, under `gradients` the norm and share of zeros of each gradient.

    Gradients are divided by `loss_scale`.
    """
    parameters = _own(executor)
    # One row of four fp64 numbers per parameter, so that the host waits for the device once.
    rows = [torch.stack([_squares(executor.part(p).local), *_of_gradient(executor, p)]) for p in parameters.values()]
    totals = _over_ranks(executor, parameters, rows)
    return {
        "weights": {name: weight**0.5 for name, (weight, *_) in totals.items()},
        "gradients": {
            name: {"norm": squares**0.5 / loss_scale, "zeros": zeros / count}
            for name, (_, squares, zeros, count) in totals.items()
            if count
        },
    }


@torch.no_grad()
def dead_units(executor: Executor) -> dict[str, int]:
    """The number of units in each MLP whose weights got no gradient from a whole batch; layers without any are left
    out."""
    matrices = {name: p.grad for name, p in _own(executor).items() if MLP_UNITS.fullmatch(name) and p.grad is not None}
    # A unit is a row of the up projection, [units, hidden].
    counts = [(executor.part(grad).local == 0).all(dim=1).sum()[None] for grad in matrices.values()]
    totals = _over_ranks(executor, matrices, counts)
    return {name: int(count) for name, (count,) in totals.items() if count}


@torch.no_grad()
def expert_shares(executor: Executor) -> dict[str, list[float]]:
    """The share of the router's choices that each expert got in the step that has been computed, by block."""
    loads = {name: mixture.load for name, mixture in mixtures(executor) if mixture.load is not None}
    totals = _over_ranks(executor, loads, [load.to(sum_dtype(load.device)) for load in loads.values()])
    return {name: [tokens / sum(counts) for tokens in counts] for name, counts in totals.items()}


def forget_loads(executor: Executor) -> None:
    """Lets experts count their tokens from 0, for another step."""
    for _, mixture in mixtures(executor):
        mixture.load = None


def mixtures(executor: Executor) -> Iterator[tuple[str, ExpertMLP]]:
    """The mixtures of experts on this rank, by the names of their blocks."""
    for model in executor.models:
        for i, block in model.blocks.items():
            if isinstance(mixture := getattr(block, "mlp", None), ExpertMLP):
                yield f"blocks.{i}", mixture


@contextmanager
def activation_statistics(executor: Executor) -> Iterator[Callable[[], Statistics]]:
    """A context manager that observes the output of each block. The function that it yields returns the root mean
    square, the largest magnitude and the share of zeros by block.
    """
    sums: dict[str, list[Tensor]] = defaultdict(list)
    largest: dict[str, list[Tensor]] = defaultdict(list)

    def observe(name: str) -> Callable[..., None]:
        @torch.no_grad()
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            sums[name].append(_sums(output))
            largest[name].append(output.abs().max().to(sum_dtype(output.device))[None])

        return hook

    def statistics() -> Statistics:
        totals = _over_ranks(executor, sums, [torch.stack(rows).sum(dim=0) for rows in sums.values()])
        most = _over_ranks(executor, largest, [torch.stack(rows).amax(dim=0) for rows in largest.values()], max)
        return {
            name: {"rms": (squares / count) ** 0.5, "max": most[name][0], "zeros": zeros / count}
            for name, (squares, zeros, count) in totals.items()
        }

    # Hooks see each micro-batch; their results stay on the device until the end of the step.
    blocks = {f"blocks.{i}": block for model in executor.models for i, block in model.blocks.items()}
    handles = [block.register_forward_hook(observe(name)) for name, block in blocks.items()]
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


def _own(executor: Executor) -> dict[str, nn.Parameter]:
    """This rank's parameters, without those whose elements another rank counts."""
    return {n: p for n, p in executor.parameters.items() if executor.saves(n) and executor.part(p).writes}


def _squares(tensor: Tensor) -> Tensor:
    return tensor.float().square().sum(dtype=sum_dtype(tensor.device))


def _sums(tensor: Tensor) -> Tensor:
    """The sum of squares, the number of zeros and the number of elements: [3]."""
    dtype = sum_dtype(tensor.device)
    count = torch.tensor(tensor.numel(), dtype=dtype, device=tensor.device)
    return torch.stack([_squares(tensor), (tensor == 0).sum(dtype=dtype), count])


def _of_gradient(executor: Executor, parameter: nn.Parameter) -> list[Tensor]:
    """`_sums` of a gradient; all 0 if there is none."""
    if parameter.grad is None:
        device = executor.part(parameter).local.device
        return list(torch.zeros(3, dtype=sum_dtype(device), device=device))
    return list(_sums(executor.part(parameter.grad).local))


def _over_ranks(
    executor: Executor, names: Iterable[str], rows: list[Tensor], join: Callable[[float, float], float] = operator.add
) -> dict[str, list[float]]:
    """Rows of numbers by name, joined element by element over all ranks, in the order of the forward pass."""
    by_name = dict(zip(names, torch.stack(rows).tolist() if rows else (), strict=True))
    total: dict[str, list[float]] = {}
    for rank in executor.gather(by_name):
        for name, numbers in rank.items():
            total[name] = list(map(join, total[name], numbers)) if name in total else numbers
    return dict(sorted(total.items(), key=lambda item: block_of(item[0])))
