"""Exact numbers of parameters, from the table of tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

from castalia.config.schema import LayerKind, ModelConfig
from castalia.config.tensor_table import (
    AFTER_BLOCKS,
    BEFORE_BLOCKS,
    BLOCK,
    FINAL_NORM,
    block_of,
    local_size,
    row_of,
    shapes_of,
    tensor_shapes,
)


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters."""

    total: int
    active: int  # that compute one token: of the experts of a block only `top_k`
    non_embedding: int  # without embedding, learned positions and an untied head
    by_kind: dict[str, int]  # "blocks.*.attn.qkv.weight" -> elements over all layers


def count(model: ModelConfig) -> ParameterCount:
    """The parameters of a model, whose vocabulary must be known."""
    numbers = Counter(model.layer_kinds)
    by_kind = {name: prod(shape) for name, shape in shapes_of(BEFORE_BLOCKS, model).items()}
    for kind, number in numbers.items():  # equal blocks are counted once
        for name, shape in shapes_of(BLOCK, model, kind).items():
            name = name.format(i="*")
            by_kind[name] = by_kind.get(name, 0) + number * prod(shape)
    by_kind |= {name: prod(shape) for name, shape in shapes_of(AFTER_BLOCKS, model).items()}
    total = sum(by_kind.values())
    idle = sum(number * (block_size(model, kind) - active_size(model, kind)) for kind, number in numbers.items())
    return ParameterCount(total, total - idle, non_embedding(model), by_kind)


def held_bytes(model: ModelConfig, element_bytes: int) -> int:
    """Bytes of the weights of a model that computes in values of so many bytes, and does not train."""
    return sum(prod(shape) * row_of(name).held_bytes(element_bytes) for name, shape in tensor_shapes(model).items())


def block_size(model: ModelConfig, kind: LayerKind) -> int:
    """Parameters of one block of this kind."""
    return sum(map(prod, shapes_of(BLOCK, model, kind).values()))


def active_size(model: ModelConfig, kind: LayerKind) -> int:
    """Parameters of a block that compute one token: of its experts only the chosen ones."""
    shapes = shapes_of(BLOCK, model, kind)
    idle = model.experts.count - model.experts.top_k if model.experts else 0
    experts = (shape for name, shape in shapes.items() if row_of(name).kind == "experts")
    return sum(map(prod, shapes.values())) - idle * sum(prod(shape[1:]) for shape in experts)


def non_embedding(model: ModelConfig) -> int:
    """Parameters of the blocks and the final norm. Needs no vocabulary."""
    blocks = sum(number * block_size(model, kind) for kind, number in Counter(model.layer_kinds).items())
    return blocks + sum(map(prod, shapes_of(FINAL_NORM, model).values()))


def neox_count(model: ModelConfig, tp: int = 1, pp: int = 1) -> int:
    """The total that GPT-NeoX prints: the sum over its ranks, with replicas, unused norms and the tied copy."""
    allocated = model.with_({"shared_norm": False})  # NeoX makes both norms of a block, used or not
    shapes = tensor_shapes(allocated)
    names = list(shapes)
    if model.tie_embeddings and pp > 1:  # the last stage holds its own copy of the embedding layer
        names += [name for name in shapes if block_of(name) < 0]
    return sum(tp * local_size(name, shapes[name], tp) for name in names)
