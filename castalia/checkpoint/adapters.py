"""A checkpoint's LoRA adapters, and the plain model that results when they are added to their matrices."""

from __future__ import annotations

from dataclasses import replace

from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import LoraConfig, is_adapter
from castalia.storage.derived import WithLora
from castalia.storage.lazy import TensorRef


def adapters_of(checkpoint: Checkpoint | None) -> LoraConfig | None:
    """The settings of a checkpoint's adapters; None where it has none."""
    return checkpoint.config.finetune.lora if checkpoint and checkpoint.config else None


def merged(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its adapters added to their matrices, and without an optimizer state.

    A checkpoint without adapters is returned as it is. Nothing is computed until a matrix is read.
    """
    lora, held = adapters_of(checkpoint), checkpoint.model
    if lora is None or checkpoint.config is None:
        return checkpoint
    model: dict[str, TensorRef] = {}
    for name, ref in held.items():
        matrix = name.removesuffix(".weight")
        if f"{matrix}.lora_a" in held:  # adapters themselves are left out below
            model[name] = WithLora(ref, held[f"{matrix}.lora_a"], held[f"{matrix}.lora_b"], lora.scale)
        elif not is_adapter(name):
            model[name] = ref
    return replace(
        checkpoint,
        model=model,
        optimizer=None,
        config=checkpoint.config.with_({"finetune.lora": None}),
        notes=(
            *checkpoint.notes,
            f"adapters of rank {lora.rank} are merged into {len(held) - len(model) >> 1} matrices",
        ),
    )
