"""Low-rank adapters on a model's matrices, and which of its tensors train."""

from __future__ import annotations

from castalia.config.schema import FinetuneConfig, LoraConfig
from castalia.config.tensor_table import row_of
from castalia.model.layers import Linear
from castalia.model.transformer import Transformer


def add_adapters(model: Transformer, lora: LoraConfig | None) -> None:
    """Give an adapter to each matrix that `lora.targets` names, or to all of the blocks if it names none.

    The values of the adapters are left unset. `model` may be a pipeline stage. None adds nothing.
    """
    if lora is None:
        return
    for name, module in model.named_modules():
        row = row_of(f"{name}.weight")
        if isinstance(module, Linear) and (
            row.module in lora.targets or not lora.targets and row.adaptable and row.module != "head"
        ):
            module.add_adapter(lora)


def freeze(model: Transformer, cfg: FinetuneConfig) -> None:
    """Switch gradients off for tensors that do not train, so that they get no optimizer state either."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(cfg.trains(name))
