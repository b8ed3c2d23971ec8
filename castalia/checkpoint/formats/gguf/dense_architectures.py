"""llama.cpp's architectures beside those of GPT-NeoX, GPT-2 and Llama; see `names.py`.

Sources: src/models at ggml-org/llama.cpp, and the names of the package `gguf`. Where llama.cpp rotates row 2j of a head
together with row 2j + 1 (`olmo`, `smollm3`), rows go by `by_group_of_pairs`; elsewhere it rotates halves, as we do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from castalia.checkpoint.formats.huggingface.model_type import by_group, by_group_of_pairs, by_module
from castalia.checkpoint.rules import Chain, Interleave, Inverse, Op, Reshape, Rule, per_block
from castalia.config.schema import ModelConfig

Holds = dict[str, set | None]
BIASES = ("attention_bias", "mlp_bias")
EVERY: Holds = {
    "qk_norm": {False}, "shared_norm": {False}, "sliding_window": {None}, "reward_head": {False},
    "rms_eps_inside": {True},
}  # fmt: skip
# llama.cpp has one GELU, the approximation by tanh.
GELU: Holds = {"norm": {"layernorm"}, "gated_mlp": {False}, "activation": {"gelu", "gelu_tanh"}}


def _nothing(model: ModelConfig) -> list[str]:
    return []


@dataclass(frozen=True)
class Architecture:
    """One value of `general.architecture`."""

    rules: Callable[[ModelConfig], list[Rule]]  # without that of the head
    fixed: Mapping[str, Any]  # settings of ours that it fixes
    holds: Mapping[str, set | None]  # values of our settings that it computes; of those left out all
    scalings: tuple[str, ...] = ()  # kinds of rotary scaling that it computes
    needs: tuple[str, ...] = ()  # settings whose tensors must be there: a model without gets zeros, or a copied head
    scales_embedding: bool = False  # whether it multiplies embeddings by the root of the hidden size
    lacks: Callable[[ModelConfig], list[str]] = _nothing  # what it does not compute of models that it otherwise holds


def all_by_kind(model: ModelConfig) -> Op:
    """From one matrix with all queries, all keys, all values, whose heads are in our order, to our fused one."""
    size = model.head_size
    parts = Inverse(Interleave((model.num_heads * size, model.kv_heads * size, model.kv_heads * size)))
    return Chain(parts, by_group(model))


BLOCK = "blk.{i}."
BEFORE = {"norm1": "attn_norm", "norm2": "ffn_norm"}
AFTER = {"norm1_out": "post_attention_norm", "norm2_out": "post_ffw_norm"}
ATTENTION = {
    "attn.qkv": "attn_q attn_k attn_v", "attn.out": "attn_output", "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
}  # fmt: skip
MLP = {"mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down"}
OUTSIDE = {"embed": "token_embd", "embed_norm": "token_embd_norm", "norm": "output_norm"}
INSIDE = BEFORE | AFTER | ATTENTION | MLP
PLAIN = by_module(BLOCK, INSIDE, OUTSIDE)
PAIRS = by_module(BLOCK, INSIDE, OUTSIDE, by_group_of_pairs)
FUSED = by_module(BLOCK, INSIDE | {"attn.qkv": "attn_qkv"}, OUTSIDE, all_by_kind)


def _stablelm_rules(model: ModelConfig) -> list[Rule]:
    """Norms of heads are matrices [heads, head size] there."""
    size, norms = model.head_size, []
    for part, heads in (("q_norm", model.num_heads), ("k_norm", model.kv_heads)) if model.qk_norm else ():
        shapes = Reshape((heads, size), (heads * size,))
        norms.append(Rule(f"blocks.{{i}}.attn.{part}.weight", f"{BLOCK}attn_{part}.weight", shapes))
    return PLAIN(model.with_({"qk_norm": False})) + per_block(norms, model.num_layers)


def _gemma2_lacks(model: ModelConfig) -> list[str]:
    """Both caps are always there, every other block has the window, and the scale follows from the sizes."""
    names = [name for name in ("attention_softcap", "logit_softcap") if getattr(model, name) is None]
    found = [f"model.{name}=None (only a number)" for name in names]
    windows = [model.window_of(layer) is not None for layer in range(model.num_layers)]
    if any(windows) and windows != [layer % 2 == 0 for layer in range(model.num_layers)]:
        found.append(f"model.window_pattern={model.window_pattern} (only (True, False))")
    scale = gemma2_scale(model.model_dump(), model.head_size)
    if model.attention_scale != scale:
        found.append(f"model.attention_scale={model.attention_scale} (only {scale})")
    return found


def gemma2_scale(model: Mapping[str, Any], head_size: int) -> float | None:
    """The `attention_scale` of a model with these settings: llama.cpp knows the 27B by its number of blocks."""
    size = model["hidden_size"] // model["num_heads"] if model["num_layers"] == 46 else head_size
    return None if size == head_size else size**-0.5


def no_rope_pattern(num_layers: int) -> list[bool]:
    """Which blocks of `smollm3` rotate."""
    return [(layer + 1) % 4 != 0 for layer in range(num_layers)]


def _smollm3_lacks(model: ModelConfig) -> list[str]:
    turning = [model.rotates(layer) for layer in range(model.num_layers)]
    right = turning == no_rope_pattern(model.num_layers)
    return [] if right else [f"model.rotary_pattern={model.rotary_pattern} (only (True, True, True, False))"]


GATED = {"position": "rotary", "norm": "rmsnorm", "gated_mlp": True, "activation": "silu"}
GATED_HOLDS = EVERY | {
    "position": {"rotary"}, "norm": {"rmsnorm"}, "gated_mlp": {True}, "activation": {"silu"}, "mlp_bias": {False},
    "attention_bias": {False}, "parallel_residual": {False}, "rotary_pct": {1.0},
}  # fmt: skip
# Their norms multiply by a weight alone: it is written as 1 + weight, and read as the weight of a plain norm.
GEMMA_HOLDS = GATED_HOLDS | {
    "zero_centered_norms": {False, True}, "head_dim": None, "activation": {"gelu", "gelu_tanh"},
    "tie_embeddings": {True},
}  # fmt: skip
GEMMA = GATED | {"activation": "gelu_tanh"}
DENSE = {
    "qwen2": Architecture(
        PLAIN, GATED | {"attention_bias": True, "attention_out_bias": False},
        GATED_HOLDS | {"attention_bias": {True}, "attention_out_bias": {False}}, ("linear", "yarn"),
    ),
    "qwen3": Architecture(
        PLAIN, GATED | {"qk_norm": "head"}, GATED_HOLDS | {"qk_norm": {"head"}, "head_dim": None}, ("linear", "yarn"),
    ),
    "gemma": Architecture(PLAIN, GEMMA, GEMMA_HOLDS, scales_embedding=True),
    "gemma2": Architecture(
        PLAIN, GEMMA | {"norm_placement": "both"},
        GEMMA_HOLDS | {
            "norm_placement": {"both"}, "attention_scale": None, "attention_softcap": None, "logit_softcap": None,
            "sliding_window": None, "window_pattern": None,
        },
        scales_embedding=True, lacks=_gemma2_lacks,
    ),
    "olmo": Architecture(
        PAIRS, GATED | {"norm": "layernorm_no_params"},
        GATED_HOLDS | {"norm": {"layernorm_no_params"}, "clip_qkv": None},
    ),
    "olmo2": Architecture(
        PLAIN, GATED | {"norm_placement": "after", "qk_norm": "width"},
        GATED_HOLDS | {"norm_placement": {"after"}, "qk_norm": {"width"}}, needs=("tie_embeddings",),
    ),
    "smollm3": Architecture(
        PAIRS, GATED, GATED_HOLDS | {"rotary_pattern": None}, lacks=_smollm3_lacks,
    ),
    "stablelm": Architecture(
        _stablelm_rules, GATED | {"norm": "layernorm", "shared_norm": True},
        GATED_HOLDS | {
            "norm": {"layernorm"}, "rotary_pct": None, "attention_bias": None, "attention_out_bias": {False},
            "qk_norm": {False, "each_head"}, "parallel_residual": None, "shared_norm": {True},
        },
        needs=("tie_embeddings",),
    ),
    "phi2": Architecture(
        PLAIN,
        {
            "position": "rotary", "norm": "layernorm", "activation": "gelu_tanh", "parallel_residual": True,
            "shared_norm": True, "head_bias": True,
        },
        EVERY | GELU | {
            "position": {"rotary"}, "parallel_residual": {True}, "shared_norm": {True}, "head_bias": None,
            "num_kv_heads": {None},
        },
        needs=(*BIASES, "head_bias", "tie_embeddings"),
    ),
    "bloom": Architecture(
        FUSED, {"position": "alibi", "norm": "layernorm", "activation": "gelu_tanh", "embedding_norm": True},
        EVERY | GELU | {
            "position": {"alibi"}, "embedding_norm": {True}, "parallel_residual": {False}, "num_kv_heads": {None},
        },
        needs=BIASES,
    ),
}  # fmt: skip
