"""Exact numbers of parameters, from the table of tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from castalia.config.schema import ModelConfig
from castalia.config.tensor_table import BLOCK, FINAL_NORM, local_size, shapes_of, tensor_shapes


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters."""

    total: int
    non_embedding: int  # without embedding, learned positions and an untied head
    by_kind: dict[str, int]  # "blocks.*.attn.qkv.weight" -> elements over all layers


def count(model: ModelConfig) -> ParameterCount:
    """The parameters of a model, whose vocabulary must be known."""
    by_kind: dict[str, int] = {}
    for name, shape in tensor_shapes(model).items():
        kind = re.sub(r"blocks\.\d+", "blocks.*", name)
        by_kind[kind] = by_kind.get(kind, 0) + prod(shape)
    return ParameterCount(sum(by_kind.values()), non_embedding(model), by_kind)


def block_size(model: ModelConfig) -> int:
    """Parameters of one block."""
    return sum(map(prod, shapes_of(BLOCK, model).values()))


def non_embedding(model: ModelConfig) -> int:
    """Parameters of the blocks and the final norm. Needs no vocabulary."""
    return model.num_layers * block_size(model) + sum(map(prod, shapes_of(FINAL_NORM, model).values()))


def neox_count(model: ModelConfig, tp: int = 1, pp: int = 1) -> int:
    """The total that GPT-NeoX prints: the sum over its ranks, with replicas, unused norms and the tied copy."""
    allocated = model.with_({"shared_norm": False})  # NeoX makes both norms of a block, used or not
    shapes = tensor_shapes(allocated)
    names = list(shapes)
    if model.tie_embeddings and pp > 1:  # the last stage holds its own copy of the embedding layer
        names += [name for name in ("embed.weight", "positions.weight") if name in shapes]
    return sum(tp * local_size(name, shapes[name], tp) for name in names)
