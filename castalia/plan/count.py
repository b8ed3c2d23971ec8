"""Parameters, counted exactly from the canonical list of tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from castalia.config.schema import FinetuneConfig, LoraConfig, ModelConfig
from castalia.errors import ConfigError

Shapes = dict[str, tuple[int, ...]]

# How tensor parallelism cuts a tensor; what is not listed is replicated on every tensor rank.
_ROWS = ("embed.weight", "head.weight", "attn.qkv.", "attn.qk_norm.", "mlp.up.", "mlp.gate.")
_COLUMNS = ("attn.out.weight", "mlp.down.weight")


def tensor_shapes(model: ModelConfig) -> Shapes:
    """Every parameter's canonical name and shape, in the model's order. ValueError if the vocabulary is unknown."""
    hidden, vocab = model.hidden_size, model.padded_vocab_size
    shapes: Shapes = {"embed.weight": (vocab, hidden)}
    if model.position == "learned":
        shapes["positions.weight"] = (model.max_positions or 0, hidden)
    for layer in range(model.num_layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block_shapes(model).items()}
    shapes |= _norm(model, "norm")
    if model.reward_head:
        shapes["reward.weight"] = (1, hidden)
    elif not model.tie_embeddings:
        shapes["head.weight"] = (vocab, hidden)
    return shapes


def adapter_shapes(model: ModelConfig, lora: LoraConfig | None) -> Shapes:
    """Names and shapes of the adapters. ConfigError if the model lacks one of their matrices."""
    if lora is None:
        return {}
    linear = ("attn.qkv", "attn.out", "mlp.up", "mlp.gate", "mlp.down", "head")
    every = ((name.removesuffix(".weight"), shape) for name, shape in tensor_shapes(model).items())
    found = {matrix: shape for matrix, shape in every if matrix.endswith(linear)}
    kinds = {matrix: re.sub(r"^blocks\.\d+\.", "", matrix) for matrix in found}
    targets = set(lora.targets) or set(kinds.values()) - {"head"}
    if lacking := targets - set(kinds.values()):
        known = ", ".join(dict.fromkeys(kinds.values()))
        tied = "; its head is the embedding" if "head" in lacking else ""
        raise ConfigError(f"finetune.lora.targets: the model has no {', '.join(sorted(lacking))}{tied}; it has {known}")
    shapes: Shapes = {}
    for matrix, (rows, columns) in found.items():
        if kinds[matrix] in targets:
            shapes |= {f"{matrix}.lora_a": (lora.rank, columns), f"{matrix}.lora_b": (rows, lora.rank)}
    return shapes


def block_shapes(model: ModelConfig) -> Shapes:
    """The tensors of one block, without the `blocks.{i}.` before their names."""
    hidden, width = model.hidden_size, model.mlp_width
    qkv = (model.num_heads + 2 * model.kv_heads) * model.head_size
    shapes = _norm(model, "norm1")
    if not model.shared_norm:
        shapes |= _norm(model, "norm2")
    shapes |= _linear("attn.qkv", qkv, hidden, model.attention_bias)
    if model.qk_norm:
        per_head = (model.num_heads, model.head_size)
        shapes |= {"attn.qk_norm.weight": per_head, "attn.qk_norm.bias": per_head}
    shapes |= _linear("attn.out", hidden, hidden, model.attention_bias)
    shapes |= _linear("mlp.up", width, hidden, model.mlp_bias)
    if model.gated_mlp:
        shapes |= _linear("mlp.gate", width, hidden, model.mlp_bias)
    return shapes | _linear("mlp.down", hidden, width, model.mlp_bias)


def _norm(model: ModelConfig, name: str) -> Shapes:
    weight, bias = f"{name}.weight", f"{name}.bias"
    hidden = (model.hidden_size,)
    kinds: dict[str, Shapes] = {
        "layernorm": {weight: hidden, bias: hidden},
        "rmsnorm": {weight: hidden},
        "scalenorm": {weight: (1,)},
        "layernorm_no_params": {},
    }
    return kinds[model.norm]


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def tp_dim(name: str) -> int | None:
    """The dimension that tensor parallelism cuts, None for a replicated tensor."""
    matrix, _, kind = name.rpartition(".")
    if kind in ("lora_a", "lora_b"):  # an adapter is cut where its matrix is
        dim = tp_dim(f"{matrix}.weight")
        return dim if dim == (1 if kind == "lora_a" else 0) else None
    if any(part in name for part in _ROWS):
        return 0
    return 1 if any(part in name for part in _COLUMNS) else None


def local_size(name: str, shape: tuple[int, ...], tp: int) -> int:
    """Elements of the tensor on one of `tp` tensor ranks."""
    return prod(shape) if tp_dim(name) is None else prod(shape) // tp


def all_shapes(model: ModelConfig, finetune: FinetuneConfig) -> Shapes:
    """Of the model's tensors and of its adapters."""
    return tensor_shapes(model) | adapter_shapes(model, finetune.lora)


@dataclass(frozen=True)
class ParameterCount:
    total: int
    non_embedding: int  # without embedding, learned positions and an untied head
    by_kind: dict[str, int]  # "blocks.*.attn.qkv.weight" -> elements over all layers


def count(model: ModelConfig) -> ParameterCount:
    by_kind: dict[str, int] = {}
    for name, shape in tensor_shapes(model).items():
        kind = re.sub(r"blocks\.\d+", "blocks.*", name)
        by_kind[kind] = by_kind.get(kind, 0) + prod(shape)
    return ParameterCount(sum(by_kind.values()), non_embedding(model), by_kind)


def block_size(model: ModelConfig) -> int:
    return sum(map(prod, block_shapes(model).values()))


def non_embedding(model: ModelConfig) -> int:
    """Parameters of the blocks and the final norm; known without a vocabulary."""
    return model.num_layers * block_size(model) + sum(map(prod, _norm(model, "norm").values()))


def original_count(model: ModelConfig, tp: int = 1, pp: int = 1) -> int:
    """What GPT-NeoX prints as total: the sum over its ranks, replicas, unused norms and the tied copy included."""
    shapes = tensor_shapes(model)
    if model.shared_norm:  # it allocates the second norm and never uses it
        for layer in range(model.num_layers):
            shapes |= _norm(model, f"blocks.{layer}.norm2")
    if model.tie_embeddings and pp > 1:  # the last stage holds its own copy of the embedding layer
        shapes |= {f"tied.{name}": shapes[name] for name in ("embed.weight", "positions.weight") if name in shapes}
    return sum(tp * local_size(name, shape, tp) for name, shape in shapes.items())
