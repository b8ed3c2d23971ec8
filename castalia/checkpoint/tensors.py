"""What every checkpoint format reads into and writes from: named lazy tensors.

Names and layouts are the canonical ones of `castalia.model.transformer`; see `docs/checkpoints.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

from castalia.checkpoint.neox_defects import INHERITED
from castalia.config.schema import RunConfig
from castalia.storage.lazy import TensorRef

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Shard:
    """The part of a tensor that this process holds: it fills it or writes it."""

    tensor: torch.Tensor
    shape: tuple[int, ...]  # of the whole tensor
    start: tuple[int, ...]  # where the part begins in it

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> Shard:
        return cls(tensor, tuple(tensor.shape), (0,) * tensor.dim())


class AdamState(TypedDict):
    """Optimizer state of one parameter; the three tensors are fp32 and have the parameter's shape.

    In our own checkpoints other optimizers than AdamW have other tensors beside `master`.
    """

    master: TensorRef
    exp_avg: TensorRef
    exp_avg_sq: TensorRef
    step: int


@dataclass(frozen=True)
class Progress:
    """How far the run was. A run that has not started yet has zeros."""

    step: int = 0  # steps done, skipped ones included
    skipped: int = 0  # steps without an update: an overflow, a spike, or the run went back behind them
    tokens: int = 0
    loss_scale: Mapping[str, float] | None = None  # fp16: the scaler's own counters
    schedule: Mapping[str, object] | None = None  # the original's stored learning-rate schedule, where there is one
    watch: Mapping[str, Sequence[float]] | None = None  # the last losses and gradient norms, by which spikes are told


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of any format, opened but not read."""

    path: str
    format: str  # "native", "neox", "megatron-deepspeed", "huggingface"
    model: Mapping[str, TensorRef]
    optimizer: Mapping[str, AdamState] | None
    progress: Progress
    config: RunConfig | None
    notes: tuple[str, ...] = ()  # what whoever computes with the model should know: guesses, what was taken for what
    state_notes: tuple[str, ...] = ()  # what only matters to who trains on: of the optimizer state
    details: Mapping[str, object] = field(default_factory=dict)  # the format's own facts: era, layout, files
    # What the original's defects left in the state (see `castalia.checkpoint.neox_defects`):
    release: str | None = None  # "v1" or "head": the one that trained it, or that its run follows
    summed_bias_ranks: int = 1  # T when row-parallel biases were summed over T tensor ranks
    norm_ranks: tuple[int, int] = (1, 1)  # (T, P) when gradient norms are of the first tensor rank and stage alone
    summed_micro_batches: int = 1  # n when Adam's moments are of gradients summed over n micro-batches, 1: of means

    @property
    def inherited(self) -> dict[str, object]:
        """What a conversion carries on of it."""
        return {name: getattr(self, name) for name in INHERITED}
