"""How the layers of a model change over the checkpoints of a run: from the first one to each of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from castalia.checkpoint.compare import measure
from castalia.checkpoint.opener import find_steps, open_checkpoint
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.tensor_table import in_order
from castalia.errors import CheckpointError
from castalia.storage.lazy import TensorRef


@dataclass(frozen=True)
class LayerChange:
    """What has become of a layer's weights, taken as one vector, since the first checkpoint."""

    norm: float
    relative: float  # norm of the difference / norm at first
    cosine: float  # of the angle between then and now

    @classmethod
    def of(cls, first: float, now: float, product: float, difference: float) -> LayerChange:
        """From sums over all weights: of squares then and now, of products, and of squared differences."""
        size = math.sqrt(first * now)
        relative = math.sqrt(difference / first) if first else math.inf if difference else 0.0
        return cls(math.sqrt(now), relative, product / size if size else 0.0)


@dataclass(frozen=True)
class LayerHistory:
    """The changes of each layer, in the model's order, at each step."""

    run: str
    steps: tuple[int, ...]
    layers: Mapping[str, tuple[LayerChange, ...]]

    def as_json(self) -> dict[str, Any]:
        """Nested plain values."""
        layers = {layer: [asdict(change) for change in changes] for layer, changes in self.layers.items()}
        return {"run": self.run, "steps": list(self.steps), "layers": layers}


def layer_of(name: str) -> str:
    """The layer of a tensor: `blocks.3`, `embed`, `head`."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]


def layer_history(run: str, advance: Callable[[str], None] = lambda step: None) -> LayerHistory:
    """Compare every checkpoint of a run, or of a folder of checkpoints, with its first. `advance` is told of each step.

    Tensors are read a piece at a time. Raises CheckpointError where there are fewer than two checkpoints, or where
    their tensors have other shapes.
    """
    folders = find_steps(Path(run))
    if len(folders) < 2:
        raise CheckpointError(f"{run} holds {len(folders)} checkpoints; changes of layers need two or more")
    first = open_checkpoint(next(iter(folders.values())))
    found: dict[str, list[LayerChange]] = {}
    for step, folder in folders.items():
        for layer, change in _changes(first, open_checkpoint(folder)):
            found.setdefault(layer, []).append(change)
        advance(f"step {step}")
    return LayerHistory(str(run), tuple(folders), {layer: tuple(changes) for layer, changes in found.items()})


def _changes(first: Checkpoint, now: Checkpoint) -> Iterator[tuple[str, LayerChange]]:
    if first.model.keys() != now.model.keys():
        raise CheckpointError(f"{now.path} has other tensors than {first.path}; one run's checkpoints are compared")
    sums: dict[str, list[float]] = {}
    for name in in_order(sorted(first.model)):
        of_layer = sums.setdefault(layer_of(name), [0.0] * 4)
        for place, value in enumerate(_sums(name, first.model[name], now.model[name], now.path)):
            of_layer[place] += value
    for layer, values in sums.items():
        yield layer, LayerChange.of(*values)


def _sums(name: str, first: TensorRef, now: TensorRef, path: str) -> tuple[float, float, float, float]:
    if tuple(first.shape) != tuple(now.shape):
        raise CheckpointError(f"{path}: {name} is {list(now.shape)}, and was {list(first.shape)} at first")
    figures = measure(first, now)
    squares = (figures.rms_a**2, figures.rms_b**2, figures.correlation * figures.rms_a * figures.rms_b)
    then, later, product = (figures.count * square for square in squares)
    return then, later, product, figures.count * figures.rms_diff**2
