"""What preference tuning needs besides the model that it trains: the reference model and the reward head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from castalia.checkpoint.tensors import Checkpoint
from castalia.config.objective import needs_reference
from castalia.config.schema import ModelConfig, RunConfig
from castalia.errors import ConfigError
from castalia.model.init import seeded_tensor
from castalia.storage.lazy import Box, Leaf, as_slices

if TYPE_CHECKING:
    import torch


def with_reference(config: RunConfig, source: Checkpoint | None) -> RunConfig:
    """The config with `preference.reference` filled in: the checkpoint of the reference model.

    A run that begins from random weights leaves it open, because the seed determines them. Raises ConfigError for a
    run that resumes another program's checkpoint, which does not name its reference model.
    """
    if not needs_reference(config) or config.preference.reference or source is None:
        return config
    if config.checkpoint.init_from is None:
        if source.format == "native":
            return config
        raise ConfigError(
            f"train.objective={config.train.objective} continues {source.path}, which does not name its "
            "reference model: name it with preference.reference"
        )
    return config.with_({"preference.reference": source.path})


def with_reward_head(model: ModelConfig, config: RunConfig, source: Checkpoint | None) -> ModelConfig:
    """The model with a reward head if the objective needs one. Raises ConfigError if a reward model has another."""
    wanted = config.train.objective == "reward"
    if model.reward_head and not wanted:
        where = source.path if source else "model.reward_head=true"
        raise ConfigError(f"{where} is a reward model: train it with train.objective=reward")
    return model.with_({"reward_head": wanted})


def as_reward_model(source: Checkpoint, model: ModelConfig, seed: int) -> Checkpoint:
    """A language model's checkpoint as that of a reward model whose reward head is still random."""
    if not model.reward_head or "reward.weight" in source.model:
        return source
    # A reward model has one output in place of the head's logits.
    tensors = {name: ref for name, ref in source.model.items() if name != "head.weight"}
    note = "the head is left out; reward.weight, which takes its place, begins with random values"
    return replace(source, model=tensors | {"reward.weight": _InitialReward(model, seed)}, notes=(*source.notes, note))


@dataclass(frozen=True)
class _InitialReward(Leaf):
    """The random initial value of the reward head's matrix, [1, hidden size]."""

    model: ModelConfig
    seed: int
    dtype_name = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        return 1, self.model.hidden_size

    def _take(self, box: Box) -> torch.Tensor:
        return seeded_tensor(self.model, self.seed, "reward.weight", self.shape, as_slices(box))
