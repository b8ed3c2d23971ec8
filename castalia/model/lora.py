"""Low-rank adapters on a model's matrices, and which of its tensors train."""

from __future__ import annotations

import re

from castalia.config.schema import FinetuneConfig, LoraConfig
from castalia.model.layers import Linear
from castalia.model.transformer import Transformer


def add_adapters(model: Transformer, lora: LoraConfig | None) -> None:
    """Adapters, their values unset, on all matrices of the model (or the stage of one) that are wanted."""
    if lora is None:
        return
    for name, module in model.named_modules():
        kind = re.sub(r"^blocks\.\d+\.", "", name)
        if isinstance(module, Linear) and (kind in lora.targets or not lora.targets and kind != name):
            module.add_adapter(lora)


def freeze(model: Transformer, cfg: FinetuneConfig) -> None:
    """What does not train gets neither gradients nor optimizer state."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(cfg.trains(name))
