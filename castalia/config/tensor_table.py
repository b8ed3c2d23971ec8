"""The model's tensors, one row each: shape, tensor-parallel split, weight decay, muP class, initial value.

Whatever needs a fact that follows from the name of a tensor asks this table: counting, initialisation, optimizer
groups, loading, comparison, inspection. A new tensor is a parameter in `castalia.model` and a row here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from functools import cache
from math import prod

from castalia.config.kind_rows import OTHER_KINDS
from castalia.config.schema import FinetuneConfig, LayerKind, LoraConfig, ModelConfig
from castalia.config.tensor_row import Init, Kind, TensorRow, layer_norm_rows, norm_rows
from castalia.errors import ConfigError

Shapes = dict[str, tuple[int, ...]]
SIZES: dict[str, Callable[[ModelConfig], int]] = {  # the words of shapes
    "vocab": lambda model: model.padded_vocab_size,
    "places": lambda model: (model.max_positions or 0) + model.position_offset,
    "positions": lambda model: model.max_positions or 0,
    "hidden": lambda model: model.hidden_size,
    "qkv": lambda model: (model.num_heads + 2 * model.kv_heads) * model.head_size,
    "attended": lambda model: model.num_heads * model.head_size,
    "q_norm": lambda model: model.head_size * (1 if model.qk_norm == "head" else model.num_heads),
    "k_norm": lambda model: model.head_size * (1 if model.qk_norm == "head" else model.kv_heads),
    "heads": lambda model: model.num_heads,
    "head_size": lambda model: model.head_size,
    "mlp": lambda model: model.mlp_width,
    "experts": lambda model: model.experts.count if model.experts else 0,
    "expert_width": lambda model: model.expert_width,
    "shared_width": lambda model: (model.experts.shared_width if model.experts else None) or 0,
    "norm": lambda model: 1 if model.norm == "scalenorm" else model.hidden_size,
    "gate": lambda model: 4 * model.hidden_size,  # of gmlp and amlp
    "gate_norm": lambda model: 1 if model.norm == "scalenorm" else 4 * model.hidden_size,
    "both": lambda model: 8 * model.hidden_size,  # the gate and what it is for
    "amlp": lambda model: model.amlp_size,
    "amlp_qkv": lambda model: 3 * model.amlp_size,
    "channels": lambda model: model.mamba_width,
    "states": lambda model: model.mamba_sizes.states,
    "taps": lambda model: model.mamba_sizes.taps,
    "dt_rank": lambda model: model.mamba_rank,
    "selection": lambda model: model.mamba_rank + 2 * model.mamba_sizes.states,
    "wide": lambda model: model.rwkv_width,
    "mix_rank": lambda model: model.rwkv_sizes.mix_rank,
    "mix_ranks": lambda model: 5 * model.rwkv_sizes.mix_rank,
    "decay_rank": lambda model: model.rwkv_sizes.decay_rank,
    "1": lambda model: 1,
    "5": lambda model: 5,
}

CONDITIONS: dict[str, Callable[[ModelConfig], bool]] = {  # what a model must have for a tensor to exist
    "learned_positions": lambda model: model.position == "learned",
    "embedding_norm": lambda model: model.embedding_norm,
    "norm_weight": lambda model: model.norm != "layernorm_no_params",
    "norm_bias": lambda model: model.norm == "layernorm",
    "norm_before": lambda model: model.norm_placement != "after",
    "norm_after": lambda model: model.norm_placement != "before",
    "second_norm": lambda model: not model.has_one_norm and model.norm_placement != "after",
    "attention_bias": lambda model: model.attention_bias,
    "out_bias": lambda model: model.out_bias,
    "joint_qk_norm": lambda model: model.qk_norm is True,
    "qk_norms": lambda model: isinstance(model.qk_norm, str),
    "qk_norm_bias": lambda model: model.qk_norm != "each_head" and model.norm == "layernorm",
    "mlp_bias": lambda model: model.mlp_bias,
    "gated_mlp": lambda model: model.gated_mlp,
    "head": lambda model: not model.tie_embeddings and not model.reward_head,
    "head_bias": lambda model: model.head_bias,
    "reward_head": lambda model: model.reward_head,
    "conv_bias": lambda model: model.mamba_sizes.conv_bias,
    "linear_bias": lambda model: model.mamba_sizes.linear_bias,
    "gated_experts": lambda model: model.experts is not None and model.experts.gated,
    "balanced": lambda model: model.experts is not None and model.experts.router == "balanced",
    "shared_expert": lambda model: model.experts is not None and model.experts.shared_width is not None,
    "shared_gate": lambda model: model.experts is not None and model.experts.shared_gate,
}
LAYER_KINDS: dict[str, tuple[LayerKind, ...]] = {  # what a block must be for it
    "attention": ("dense", "moe"),
    "dense": ("dense",),
    "moe": ("moe",),
    "gmlp": ("gmlp", "amlp"),
    "amlp": ("amlp",),
    "mamba": ("mamba",),
    "rwkv": ("rwkv",),
    "model_norm": ("dense", "moe", "gmlp", "amlp", "mamba"),  # the norm that `model.norm` names
}


def _linear(module: str, shape: str, bias: str, kind: Kind, tp_dim: int, needs: str = "") -> list[TensorRow]:
    """A matrix of the blocks, split by rows (0) or columns (1), and its bias.

    Those that are split by columns add to the residual stream, so their initial values shrink with the depth.
    """
    name, split_bias = f"blocks.{{i}}.{module}", 0 if tp_dim == 0 else None
    init: Init = "residual" if tp_dim == 1 else "random"
    return [
        TensorRow(f"{name}.weight", shape, needs, kind, init, tp_dim, mup="matrix", adaptable=True),
        TensorRow(
            f"{name}.bias", shape.split()[0], f"{needs} {bias}", "biases", "zeros", split_bias, False,
            row_parallel_bias=tp_dim == 1,
        ),
    ]  # fmt: skip


BEFORE_BLOCKS = (
    TensorRow("embed.weight", "vocab hidden", kind="embedding", tp_dim=0),
    TensorRow("positions.weight", "places hidden", "learned_positions", "positions"),
    *layer_norm_rows("embed_norm", "embedding_norm"),
)
BLOCK = (
    *norm_rows("blocks.{i}.norm1", "model_norm norm_before"),
    *norm_rows("blocks.{i}.norm1_out", "attention norm_after"),
    *norm_rows("blocks.{i}.norm2", "attention second_norm"),
    *norm_rows("blocks.{i}.norm2_out", "attention norm_after"),
    *_linear("attn.qkv", "qkv hidden", "attention_bias", "attention qkv", 0, "attention"),
    # Only GPT-NeoX splits these two; castalia.parallel.rank_grid refuses tensor parallelism of a model that has them.
    TensorRow(
        "blocks.{i}.attn.qk_norm.weight", "heads head_size", "attention joint_qk_norm", "norms", "ones", 0, decays=False
    ),
    TensorRow(
        "blocks.{i}.attn.qk_norm.bias", "heads head_size", "attention joint_qk_norm", "biases", "zeros", 0, decays=False
    ),
    *(
        row
        for part in ("q_norm", "k_norm")
        for row in (
            TensorRow(f"blocks.{{i}}.attn.{part}.weight", part, "attention qk_norms", "norms", "ones", decays=False),
            TensorRow(
                f"blocks.{{i}}.attn.{part}.bias",
                part,
                "attention qk_norms qk_norm_bias",
                "biases",
                "zeros",
                decays=False,
            ),
        )
    ),
    *_linear("attn.out", "hidden attended", "out_bias", "attention out", 1, "attention"),
    *_linear("mlp.up", "mlp hidden", "mlp_bias", "mlp up", 0, "dense"),
    *_linear("mlp.gate", "mlp hidden", "mlp_bias", "mlp gate", 0, "dense gated_mlp"),
    *_linear("mlp.down", "hidden mlp", "mlp_bias", "mlp down", 1, "dense"),
    TensorRow("blocks.{i}.mlp.router.weight", "experts hidden", "moe", "router"),
    TensorRow("blocks.{i}.mlp.router.balance.bias", "experts", "moe balanced", "router bias", "zeros", decays=False),
    TensorRow("blocks.{i}.mlp.experts.up", "experts expert_width hidden", "moe", "experts", tp_dim=0),
    TensorRow("blocks.{i}.mlp.experts.gate", "experts expert_width hidden", "moe gated_experts", "experts", tp_dim=0),
    TensorRow("blocks.{i}.mlp.experts.down", "experts expert_width hidden", "moe", "experts", "residual", 0),
    *_linear("mlp.shared.up", "shared_width hidden", "", "shared expert", 0, "moe shared_expert")[:1],
    *_linear("mlp.shared.gate", "shared_width hidden", "", "shared expert", 0, "moe shared_expert gated_experts")[:1],
    *_linear("mlp.shared.down", "hidden shared_width", "", "shared expert", 1, "moe shared_expert")[:1],
    TensorRow("blocks.{i}.mlp.shared_gate.weight", "1 hidden", "moe shared_expert shared_gate", "router"),
    *OTHER_KINDS,
)
FINAL_NORM = tuple(norm_rows("norm"))
AFTER_BLOCKS = (
    *FINAL_NORM,
    TensorRow("head.weight", "vocab hidden", "head", "head", tp_dim=0, adaptable=True),
    TensorRow("head.bias", "vocab", "head head_bias", "biases", "zeros", 0, decays=False),
    TensorRow("reward.weight", "1 hidden", "reward_head", "reward head"),
)
ROWS = (*BEFORE_BLOCKS, *BLOCK, *AFTER_BLOCKS)


def _adapters(row: TensorRow) -> list[TensorRow]:
    """The LoRA matrices of a row: lora_a [rank, in] and lora_b [out, rank], split along in and out as the row is."""
    name, (rows, columns) = row.name.removesuffix("weight"), row.shape.split()
    split_in, split_out = (1 if row.tp_dim == 1 else None), (0 if row.tp_dim == 0 else None)
    row = row._replace(kind="adapters", adaptable=False)
    a = row._replace(name=f"{name}lora_a", shape=f"rank {columns}", init="adapter", tp_dim=split_in)
    b = row._replace(name=f"{name}lora_b", shape=f"{rows} rank", init="zeros", tp_dim=split_out)
    return [a, b]


_BY_NAME = {row.name: row for row in (*ROWS, *(part for row in ROWS if row.adaptable for part in _adapters(row)))}
_PLACES = {row.name: number for number, row in enumerate(ROWS)}  # of those outside of blocks
_FIRST_MODULES = {row.module for row in BEFORE_BLOCKS}


@cache
def row_of(name: str) -> TensorRow:
    """The row of a tensor or an adapter of the model; for any other name one that claims nothing."""
    return _BY_NAME.get(re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name)) or TensorRow(name, shape="")


def tensor_shapes(model: ModelConfig) -> Shapes:
    """Every parameter's name and shape, in the model's order. Raises ValueError if the vocabulary is unknown."""
    kinds = model.layer_kinds
    blocks = {kind: shapes_of(BLOCK, model, kind) for kind in set(kinds)}
    return (
        shapes_of(BEFORE_BLOCKS, model)
        | {name.format(i=layer): shape for layer, kind in enumerate(kinds) for name, shape in blocks[kind].items()}
        | shapes_of(AFTER_BLOCKS, model)
    )


def shapes_of(rows: Iterable[TensorRow], model: ModelConfig, kind: LayerKind = "dense") -> Shapes:
    """Shapes of those rows whose tensors the model has, of a block those that one of this kind has."""

    def holds(need: str) -> bool:
        return kind in LAYER_KINDS[need] if need in LAYER_KINDS else CONDITIONS[need](model)

    present = (row for row in rows if all(map(holds, row.needs.split())))
    return {row.name: tuple(SIZES[word](model) for word in row.shape.split()) for row in present}


def adapter_shapes(model: ModelConfig, lora: LoraConfig | None) -> Shapes:
    """Names and shapes of the adapters. Raises ConfigError if the model lacks one of the matrices to adapt."""
    if lora is None:
        return {}
    matrices = {name: shape for name, shape in tensor_shapes(model).items() if row_of(name).adaptable}
    present = list(dict.fromkeys(row_of(name).module for name in matrices))
    targets = set(lora.targets) or set(present) - {"head"}
    if lacking := targets - set(present):
        tied = "; its head is the embedding" if "head" in lacking else ""
        raise ConfigError(
            f"finetune.lora.targets: the model has no {', '.join(sorted(lacking))}{tied}; it has {', '.join(present)}"
        )
    shapes: Shapes = {}
    for name, (rows, columns) in matrices.items():
        if row_of(name).module in targets:
            matrix = name.removesuffix(".weight")
            shapes |= {f"{matrix}.lora_a": (lora.rank, columns), f"{matrix}.lora_b": (rows, lora.rank)}
    return shapes


def all_shapes(model: ModelConfig, finetune: FinetuneConfig) -> Shapes:
    """Names and shapes of the model's tensors and of its adapters."""
    return tensor_shapes(model) | adapter_shapes(model, finetune.lora)


def block_of(name: str) -> int:
    """The number of the block that holds a tensor or module; -1 before all blocks, a huge number after them."""
    if block := re.match(r"blocks\.(\d+)", name):
        return int(block[1])
    return -1 if name.split(".")[0] in _FIRST_MODULES else sys.maxsize


def in_order(names: Iterable[str]) -> list[str]:
    """Tensors in the order of the model, those of one block by name."""
    return sorted(names, key=lambda name: (block_of(name), _PLACES.get(name, len(ROWS)), name))


def in_one_block(names: Iterable[str]) -> list[str]:
    """The names with those of all blocks as of block 0, each once: for messages that list the tensors of a model."""
    return list(dict.fromkeys(re.sub(r"^blocks\.\d+", "blocks.0", name) for name in names))


def tp_dim(name: str) -> int | None:
    """The dimension that tensor parallelism splits, None for a tensor of which every tensor rank has a copy."""
    return row_of(name).tp_dim


def local_size(name: str, shape: tuple[int, ...], tp: int) -> int:
    """Elements of the tensor on one of `tp` tensor ranks."""
    return prod(shape) if tp_dim(name) is None else prod(shape) // tp


def constant_value(cfg: ModelConfig, name: str) -> float | None:
    """The value with which a norm, a bias or `lora_b` begins; None for tensors that are random."""
    row, each_head = row_of(name), cfg.qk_norm == "each_head"
    # Norms that are not the model's kind, such as RWKV's own, multiply by their weight alone.
    centered = {"norm_weight"} if each_head else {"norm_weight", "qk_norms"}
    if cfg.zero_centered_norms and row.init == "ones" and centered & set(row.needs.split()):
        return 0.0
    return {"zeros": 0.0, "ones": 1.0}.get(row.init)
