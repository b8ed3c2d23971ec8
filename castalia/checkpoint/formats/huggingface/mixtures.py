"""Model types of Hugging Face with mixtures of experts; see `model_type.py`.

Sources: configuration_*.py and modeling_*.py of each type in transformers 4.57 and 5. Keys of experts are dotted names
of our settings.
"""

from __future__ import annotations

from typing import Any

from castalia.checkpoint.formats.huggingface.dense_families import (
    ATTENTION,
    BEFORE,
    DEFAULTS,
    GATED_MLP,
    HEAD_NORMS,
    OUTSIDE,
    RMS,
    RMS_GATED,
    RMS_HOLDS,
    ROPE,
    SIZES,
    WINDOW_HOLDS,
    WINDOWS,
    Holds,
)
from castalia.checkpoint.formats.huggingface.model_type import Family, Said, by_module
from castalia.config.schema import ExpertsConfig, ModelConfig

Keys = dict[str, Said]

# Of the loss for balancing, which no class adds to what the model computes.
BESIDE = ("output_router_logits", "router_aux_loss_coef")
NO_MODULES = ("", "", "")  # transformers 5 fuses the experts' matrices, so that a Trainer's state is of other tensors
FIXED = RMS_GATED | {"experts.gated": True}
# Softmax over all experts, in all blocks, without a shared one.
PLAIN: Holds = {
    "experts.gated": {True}, "experts.router": {"topk"}, "experts.shared_width": {None},
    "experts.shared_gate": {False}, "experts.routed_scale": {1.0}, "experts.first": {0}, "experts.every": {1},
    "experts.jitter": {0.0},
}  # fmt: skip
SOME_BLOCKS: Holds = {"experts.first": None, "experts.every": None}
NORM_TOPK: Holds = {"experts.norm_topk": None}
SHARES: Keys = {"num_experts_per_tok": "experts.top_k", "norm_topk_prob": "experts.norm_topk"}
QWEN_EXPERTS: Keys = {
    "decoder_sparse_step": "experts.every", "mlp_only_layers": "experts.first",
    "moe_intermediate_size": "experts.width", "num_experts": "experts.count", **SHARES,
}  # fmt: skip
QWEN_DEFAULTS: dict[str, Any] = DEFAULTS | {
    "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 24, "max_position_embeddings": 32768,
    "use_sliding_window": False, "sliding_window": 4096, "decoder_sparse_step": 1, "norm_topk_prob": False,
}  # fmt: skip

ROUTER = {"mlp.router": "mlp.gate"}
EXPERTS = {f"mlp.experts.{part}": f"mlp.experts.{{e}}.{part}_proj.weight" for part in ("up", "gate", "down")}
SHARED = {f"mlp.shared.{part}": f"mlp.shared_expert.{part}_proj" for part in ("up", "gate", "down")}
MIXED = BEFORE | ATTENTION | GATED_MLP | ROUTER | EXPERTS

MIXTURES = {
    "mixtral": Family(
        "MixtralForCausalLM", "model.", "lm_head.weight",
        SIZES | ROPE | RMS | {
            "head_dim": "head_dim", "sliding_window": "sliding_window", "intermediate_size": "experts.width",
            "num_local_experts": "experts.count", "num_experts_per_tok": "experts.top_k", "router_jitter_noise": 0.0,
        },
        FIXED | {"attention_bias": False, "experts.norm_topk": True},
        RMS_HOLDS | PLAIN | {
            "experts.norm_topk": {True}, "attention_bias": {False}, "head_dim": None, "sliding_window": None,
        },
        DEFAULTS | {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "num_local_experts": 8,
            "num_experts_per_tok": 2, "router_jitter_noise": 0.0,
        },
        by_module(
            "layers.{i}.",
            BEFORE | ATTENTION | {
                "mlp.router": "block_sparse_moe.gate",
                "mlp.experts.gate": "block_sparse_moe.experts.{e}.w1.weight",
                "mlp.experts.down": "block_sparse_moe.experts.{e}.w2.weight",
                "mlp.experts.up": "block_sparse_moe.experts.{e}.w3.weight",
            },
            OUTSIDE,
        ),
        NO_MODULES, beside=BESIDE, aliases={"num_experts": "num_local_experts"},
    ),
    "olmoe": Family(
        "OlmoeForCausalLM", "model.", "lm_head.weight",
        SIZES | ROPE | RMS | {
            "attention_bias": "attention_bias", "intermediate_size": "experts.width", "num_experts": "experts.count",
            **SHARES,
        },
        FIXED | {"qk_norm": "width"},
        RMS_HOLDS | PLAIN | NORM_TOPK | {"qk_norm": {"width"}},
        DEFAULTS | {
            "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16,
            "num_attention_heads": 16, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts": 64,
            "num_experts_per_tok": 8, "norm_topk_prob": False,
        },
        by_module("layers.{i}.", MIXED | HEAD_NORMS, OUTSIDE),
        # Its clip_qkv acts after the norms of queries and keys, ours before.
        NO_MODULES, refused=("clip_qkv", "sliding_window"), beside=("head_dim", *BESIDE),
        aliases={"num_local_experts": "num_experts"},
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM", "model.", "lm_head.weight",
        SIZES | RMS | ROPE | WINDOWS | QWEN_EXPERTS
        | {"qkv_bias": "attention_bias", "shared_expert_intermediate_size": "experts.shared_width"},
        FIXED | {"attention_out_bias": False, "experts.shared_gate": True},
        RMS_HOLDS | WINDOW_HOLDS | PLAIN | SOME_BLOCKS | NORM_TOPK | {
            "attention_out_bias": {False}, "experts.shared_width": None, "experts.shared_gate": {True},
        },
        QWEN_DEFAULTS | {
            "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16, "max_window_layers": 28,
            "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4,
            "num_experts": 60, "qkv_bias": True,
        },
        by_module(
            "layers.{i}.", MIXED | SHARED | {"mlp.shared_gate": "mlp.shared_expert_gate"}, OUTSIDE
        ),
        NO_MODULES, beside=("head_dim", "max_window_layers", *BESIDE),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", "model.", "lm_head.weight",
        SIZES | RMS | ROPE | QWEN_EXPERTS | {
            "head_dim": "head_dim", "attention_bias": "attention_bias", "use_sliding_window": "use_window",
            "sliding_window": "sliding_window",
        },
        FIXED | {"qk_norm": "head"},
        RMS_HOLDS | PLAIN | SOME_BLOCKS | NORM_TOPK | {
            "qk_norm": {"head"}, "head_dim": None, "sliding_window": None,
        },
        QWEN_DEFAULTS | {
            "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4,
            "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128,
        },
        by_module("layers.{i}.", MIXED | HEAD_NORMS, OUTSIDE),
        NO_MODULES, beside=("max_window_layers", *BESIDE), aliases={"num_local_experts": "num_experts"},
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM", "model.", "lm_head.weight",
        SIZES | RMS | ROPE | SHARES | {
            "head_dim": "head_dim", "attention_bias": "attention_bias", "use_qk_norm": "qk_norm",
            "moe_intermediate_size": "experts.width", "n_routed_experts": "experts.count",
            "n_shared_experts": "experts.shared_width", "first_k_dense_replace": "experts.first",
            "routed_scaling_factor": "experts.routed_scale", "n_group": 1, "topk_group": 1,
            "num_nextn_predict_layers": "further_blocks",
        },
        FIXED | {"attention_out_bias": False, "experts.router": "balanced"},
        RMS_HOLDS | PLAIN | NORM_TOPK | {
            "rotary_pct": None, "qk_norm": {False, "head"}, "head_dim": None, "attention_out_bias": {False},
            "experts.router": {"balanced"}, "experts.first": None, "experts.shared_width": None,
            "experts.routed_scale": None,
        },
        DEFAULTS | {
            "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46,
            "num_attention_heads": 96, "num_key_value_heads": 8, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "moe_intermediate_size": 1408,
            "num_experts_per_tok": 8, "n_shared_experts": 1, "n_routed_experts": 128, "routed_scaling_factor": 1.0,
            "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": True, "use_qk_norm": False,
        },
        by_module(
            "layers.{i}.",
            MIXED | HEAD_NORMS | {"mlp.router.balance.bias": "mlp.gate.e_score_correction_bias"}
            | {module: name.replace("shared_expert", "shared_experts") for module, name in SHARED.items()},
            OUTSIDE,
        ),
        NO_MODULES, words={"use_qk_norm": {False: False, True: "head"}}, beside=BESIDE,
        aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    ),
}  # fmt: skip


def plain_experts(model: ModelConfig) -> ExpertsConfig:
    """Of the settings that make the same mixture, the plainest, with the values that None stands for."""
    assert model.experts is not None
    given = model.experts
    plain: dict[str, Any] = {"width": model.expert_width, "norm_topk": given.divides_shares}
    if len(range(given.first, model.num_layers, given.every)) == 1:
        plain["every"] = model.num_layers - given.first
    if given.shared_width is None:
        plain["shared_gate"] = False
    if given.router != "topk":
        plain["jitter"] = 0.0
    return given.with_(plain)
