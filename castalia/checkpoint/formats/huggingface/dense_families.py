"""Model types of Hugging Face beside those of GPT-NeoX, GPT-2, Llama and Mamba; see `model_type.py`.

Sources: configuration_*.py and modeling_*.py of each type in transformers 4.57 and 5.
"""

from __future__ import annotations

from typing import Any

from castalia.checkpoint.formats.huggingface.model_type import Family, by_group_of_pairs, by_module
from castalia.checkpoint.rules import Interleave, Rule, Same, per_block
from castalia.config.schema import ModelConfig

Keys = dict[str, str | bool]
Holds = dict[str, set | None]

ROPE: Keys = {
    "rope_theta": "rotary_base", "partial_rotary_factor": "rotary_pct", "rope_scaling": "rope_scaling",
    "rope_parameters": "rope_scaling",
}  # fmt: skip
SIZES: Keys = {
    "num_hidden_layers": "num_layers", "hidden_size": "hidden_size", "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads", "intermediate_size": "mlp_size", "max_position_embeddings": "max_positions",
    "hidden_act": "activation", "attention_dropout": "attention_dropout",
}  # fmt: skip
RMS: Keys = {"rms_norm_eps": "norm_eps"}
WINDOWS: Keys = {
    "use_sliding_window": "use_window", "sliding_window": "sliding_window", "layer_types": "window_pattern",
}  # fmt: skip
QWEN_WINDOWS = WINDOWS | {"max_window_layers": "whole_layers"}
GATED = {"gated_mlp": True, "mlp_bias": False}
RMS_GATED = GATED | {"norm": "rmsnorm"}
# Nothing is fixed but what each family says.
COMMON_HOLDS: Holds = {
    "position": {"rotary"}, "rotary_pct": {1.0}, "parallel_residual": {False}, "qk_norm": {False}, "mlp_bias": {False},
    "gated_mlp": {True}, "sliding_window": {None},
}  # fmt: skip
RMS_HOLDS = COMMON_HOLDS | {"norm": {"rmsnorm"}, "rms_eps_inside": {True}}
NORM_HOLDS = COMMON_HOLDS | {"norm": {"layernorm"}}
GPT_HOLDS: Holds = {
    "norm": {"layernorm"}, "gated_mlp": {False}, "qk_norm": {False}, "num_kv_heads": {None}, "mlp_bias": {True},
    "sliding_window": {None}, "parallel_residual": {False},
}  # fmt: skip
WINDOW_HOLDS: Holds = {"sliding_window": None, "window_pattern": None}
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0, "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
    "mlp_bias": False,
}  # fmt: skip
QWEN_DEFAULTS = DEFAULTS | {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768, "use_sliding_window": False,
    "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
OLMO_DEFAULTS = DEFAULTS | {
    "vocab_size": 50304, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048,
}  # fmt: skip

PROJECTIONS = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
BEFORE = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
AFTER = {"norm1_out": "post_attention_layernorm", "norm2_out": "post_feedforward_layernorm"}
FOUR_NORMS = {
    "norm1": "input_layernorm", "norm1_out": "post_attention_layernorm", "norm2": "pre_feedforward_layernorm",
    "norm2_out": "post_feedforward_layernorm",
}  # fmt: skip
ATTENTION = {"attn.qkv": PROJECTIONS, "attn.out": "self_attn.o_proj"}
HEAD_NORMS = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
GATED_MLP = {"mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
LLAMA_INSIDE = BEFORE | ATTENTION | GATED_MLP
OUTSIDE = {"embed": "embed_tokens", "norm": "norm"}
MODEL_RULES = by_module("layers.{i}.", LLAMA_INSIDE | HEAD_NORMS, OUTSIDE)
OLMO2_RULES = by_module("layers.{i}.", AFTER | ATTENTION | HEAD_NORMS | GATED_MLP, OUTSIDE)

GPT_ALIASES = {
    "num_hidden_layers": "n_layer", "hidden_size": "n_embd", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}  # fmt: skip
MLP_MODULES = "mlp.gate_proj mlp.up_proj mlp.down_proj"
NORM_MODULES = "input_layernorm post_attention_layernorm"
LLAMA_MODULES = ("embed_tokens", f"{PROJECTIONS} self_attn.o_proj {MLP_MODULES} {NORM_MODULES}", "norm")
HEAD_NORM_MODULES = f"{PROJECTIONS} self_attn.o_proj self_attn.q_norm self_attn.k_norm {MLP_MODULES}"


def _each_head(model: ModelConfig) -> list[Rule]:
    """StableLM, whose norms of heads are a module each."""
    size, rules = model.head_size, []
    for part, heads in (("q", model.num_heads), ("k", model.kv_heads)):
        names = " ".join(f"layers.{{i}}.self_attn.{part}_layernorm.norms.{head}.weight" for head in range(heads))
        rules.append(Rule(f"blocks.{{i}}.attn.{part}_norm.weight", names, Interleave((size,) * heads)))
    plain = by_module("layers.{i}.", LLAMA_INSIDE, OUTSIDE)(model.with_({"qk_norm": False}))
    return plain + (per_block(rules, model.num_layers) if model.qk_norm else [])


DENSE = {
    "qwen2": Family(
        "Qwen2ForCausalLM", "model.", "lm_head.weight", SIZES | RMS | ROPE | QWEN_WINDOWS,
        RMS_GATED | {"attention_bias": True, "attention_out_bias": False},
        RMS_HOLDS | WINDOW_HOLDS | {"attention_bias": {True}, "attention_out_bias": {False}},
        QWEN_DEFAULTS, MODEL_RULES, LLAMA_MODULES, beside=("head_dim",),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM", "model.", "lm_head.weight",
        SIZES | RMS | ROPE | QWEN_WINDOWS | {"head_dim": "head_dim", "attention_bias": "attention_bias"},
        RMS_GATED | {"qk_norm": "head"}, RMS_HOLDS | WINDOW_HOLDS | {"qk_norm": {"head"}, "head_dim": None},
        QWEN_DEFAULTS | {"head_dim": 128}, MODEL_RULES,
        ("embed_tokens", f"{HEAD_NORM_MODULES} {NORM_MODULES}", "norm"),
    ),
    "gemma": Family(
        "GemmaForCausalLM", "model.", "lm_head.weight",
        SIZES | RMS | ROPE | {"head_dim": "head_dim", "attention_bias": "attention_bias"},
        RMS_GATED | {"zero_centered_norms": True},
        RMS_HOLDS | {"zero_centered_norms": {True}, "head_dim": None},
        DEFAULTS | {
            "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192,
            "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True,
        },
        MODEL_RULES, LLAMA_MODULES, refused=("use_bidirectional_attention",),
        words={"hidden_act": {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh"}},  # its first files mean tanh
        scales_embedding=True, aliases={"hidden_activation": "hidden_act"},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM", "model.", "lm_head.weight",
        {key: name for key, name in SIZES.items() if key != "hidden_act"} | RMS | ROPE
        | {
            "hidden_activation": "activation", "head_dim": "head_dim", "attention_bias": "attention_bias",
            "query_pre_attn_scalar": "attention_scale", "sliding_window": "some_window sliding_window",
            "layer_types": "window_pattern", "attn_logit_softcapping": "attention_softcap",
            "final_logit_softcapping": "logit_softcap",
        },
        RMS_GATED | {"zero_centered_norms": True, "norm_placement": "both"},
        RMS_HOLDS | WINDOW_HOLDS | {
            "zero_centered_norms": {True}, "norm_placement": {"both"}, "head_dim": None, "attention_scale": None,
            "attention_softcap": None, "logit_softcap": None,
        },
        DEFAULTS | {
            "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
            "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
            "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        },
        by_module("layers.{i}.", FOUR_NORMS | ATTENTION | GATED_MLP, OUTSIDE),
        ("embed_tokens", f"{PROJECTIONS} self_attn.o_proj {MLP_MODULES} {' '.join(FOUR_NORMS.values())}", "norm"),
        refused=("use_bidirectional_attention",), scales_embedding=True, beside=("hidden_act",),
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM", "model.", "lm_head.weight", SIZES | RMS | ROPE | {"attention_bias": "attention_bias"},
        RMS_GATED | {"norm_placement": "after", "qk_norm": "width"},
        RMS_HOLDS | {"norm_placement": {"after"}, "qk_norm": {"width"}},
        OLMO_DEFAULTS | {"rms_norm_eps": 1e-5}, OLMO2_RULES,
        ("embed_tokens", f"{HEAD_NORM_MODULES} post_attention_layernorm post_feedforward_layernorm", "norm"),
        beside=("head_dim",),
    ),
    "olmo": Family(
        "OlmoForCausalLM", "model.", "lm_head.weight",
        SIZES | ROPE | {"attention_bias": "attention_bias", "clip_qkv": "clip_qkv"},
        GATED | {"norm": "layernorm_no_params", "norm_eps": 1e-5},
        COMMON_HOLDS | {"norm": {"layernorm_no_params"}, "norm_eps": {1e-5}, "clip_qkv": None},
        OLMO_DEFAULTS, MODEL_RULES, LLAMA_MODULES, beside=("head_dim",),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM", "model.", "lm_head.weight",
        SIZES | RMS | ROPE | WINDOWS
        | {"no_rope_layers": "rotary_pattern", "attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        {"norm": "rmsnorm", "gated_mlp": True},
        RMS_HOLDS | WINDOW_HOLDS | {"rotary_pattern": None, "mlp_bias": None},
        DEFAULTS | {
            "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 32768,
            "rope_theta": 2000000.0, "no_rope_layer_interval": 4, "tie_word_embeddings": True,
        },
        MODEL_RULES, LLAMA_MODULES, beside=("head_dim", "no_rope_layer_interval"),
    ),
    "stablelm": Family(
        "StableLmForCausalLM", "model.", "lm_head.weight",
        SIZES | ROPE | {
            "layer_norm_eps": "norm_eps", "use_qkv_bias": "attention_bias", "qk_layernorm": "qk_norm",
            "use_parallel_residual": "parallel_residual",
        },
        GATED | {"norm": "layernorm", "attention_out_bias": False, "shared_norm": True},
        NORM_HOLDS | {
            "rotary_pct": None, "attention_out_bias": {False}, "qk_norm": {False, "each_head"},
            "parallel_residual": None, "shared_norm": {True},
        },
        DEFAULTS | {
            "vocab_size": 50304, "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
            "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "use_qkv_bias": False, "qk_layernorm": False,
            "use_parallel_residual": False,
        },
        _each_head, ("", "", ""), refused=("hidden_dropout",), beside=("head_dim",),
        words={"qk_layernorm": {False: False, True: "each_head"}},
    ),
    "phi": Family(
        "PhiForCausalLM", "model.", "lm_head.weight",
        SIZES | ROPE | {
            "layer_norm_eps": "norm_eps", "embd_pdrop": "embedding_dropout", "resid_pdrop": "hidden_dropout",
            "qk_layernorm": "qk_norm", "head_dim": "head_dim", "tie_word_embeddings": False,
        },
        {"norm": "layernorm", "parallel_residual": True, "shared_norm": True, "head_bias": True},
        GPT_HOLDS | {
            "position": {"rotary"}, "rotary_pct": None, "parallel_residual": {True}, "shared_norm": {True},
            "num_kv_heads": None, "attention_bias": {True}, "head_bias": {True}, "qk_norm": {False, "head"},
            "head_dim": None, "tie_embeddings": {False},
        },
        DEFAULTS | {
            "vocab_size": 51200, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
            "num_attention_heads": 32, "max_position_embeddings": 2048, "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
            "qk_layernorm": False,
        },
        by_module(
            "layers.{i}.",
            {
                "norm1": "input_layernorm", "attn.qkv": PROJECTIONS, "attn.out": "self_attn.dense",
                "attn.q_norm": "self_attn.q_layernorm", "attn.k_norm": "self_attn.k_layernorm", "mlp.up": "mlp.fc1",
                "mlp.down": "mlp.fc2",
            },
            {"embed": "embed_tokens", "norm": "final_layernorm"},
        ),
        (
            "embed_tokens",
            f"{PROJECTIONS} self_attn.dense self_attn.q_layernorm self_attn.k_layernorm mlp.fc1 mlp.fc2 "
            "input_layernorm",
            "final_layernorm",
        ),
        gelu_tanh="gelu_new", words={"qk_layernorm": {False: False, True: "head"}},
    ),
    "gptj": Family(
        "GPTJForCausalLM", "transformer.", "lm_head.weight",
        {
            "n_layer": "num_layers", "n_embd": "hidden_size", "n_head": "num_heads", "n_inner": "mlp_size",
            "n_positions": "max_positions", "rotary_dim": "rotary_pct", "activation_function": "activation",
            "layer_norm_epsilon": "norm_eps", "embd_pdrop": "embedding_dropout", "resid_pdrop": "hidden_dropout",
            "attn_pdrop": "attention_dropout", "tie_word_embeddings": False,
        },
        {
            "norm": "layernorm", "parallel_residual": True, "shared_norm": True, "attention_bias": False,
            "head_bias": True,
        },
        GPT_HOLDS | {
            "position": {"rotary"}, "rotary_pct": None, "rotary_base": {10000.0}, "rope_scaling": {None},
            "parallel_residual": {True}, "shared_norm": {True}, "attention_bias": {False}, "head_bias": {True},
            "tie_embeddings": {False},
        },
        {
            "vocab_size": 50400, "n_positions": 2048, "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64,
            "n_inner": None, "activation_function": "gelu_new", "resid_pdrop": 0.0, "embd_pdrop": 0.0,
            "attn_pdrop": 0.0, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
        },
        by_module(
            "h.{i}.",
            {
                "norm1": "ln_1", "attn.qkv": "attn.q_proj attn.k_proj attn.v_proj", "attn.out": "attn.out_proj",
                "mlp.up": "mlp.fc_in", "mlp.down": "mlp.fc_out",
            },
            {"embed": "wte", "norm": "ln_f"}, by_group_of_pairs,
        ),
        ("wte", "ln_1 attn.k_proj attn.v_proj attn.q_proj attn.out_proj mlp.fc_in mlp.fc_out", "ln_f"),
        gelu_tanh="gelu_new", aliases=GPT_ALIASES, beside=("rotary", "scale_attn_weights", "n_ctx"),
    ),
    "gpt_neo": Family(
        "GPTNeoForCausalLM", "transformer.", "lm_head.weight",
        {
            "num_layers": "num_layers", "hidden_size": "hidden_size", "num_heads": "num_heads",
            "intermediate_size": "mlp_size", "max_position_embeddings": "max_positions",
            "attention_types": "window_pattern", "window_size": "sliding_window", "activation_function": "activation",
            "layer_norm_epsilon": "norm_eps", "resid_dropout": "hidden_dropout", "embed_dropout": "embedding_dropout",
            "attention_dropout": "attention_dropout",
        },
        {"position": "learned", "attention_bias": False, "attention_out_bias": True, "attention_scale": 1.0},
        GPT_HOLDS | WINDOW_HOLDS | {
            "position": {"learned"}, "attention_bias": {False}, "attention_out_bias": {True}, "attention_scale": {1.0},
        },
        {
            "vocab_size": 50257, "max_position_embeddings": 2048, "hidden_size": 2048, "num_layers": 24,
            "num_heads": 16, "attention_types": [[["global", "local"], 12]], "window_size": 256,
            "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "resid_dropout": 0.0, "embed_dropout": 0.0,
            "attention_dropout": 0.0, "tie_word_embeddings": True,
        },
        by_module(
            "h.{i}.",
            {
                "norm1": "ln_1", "norm2": "ln_2",
                "attn.qkv": "attn.attention.q_proj attn.attention.k_proj attn.attention.v_proj",
                "attn.out": "attn.attention.out_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
            },
            {"embed": "wte", "positions": "wpe", "norm": "ln_f"},
        ),
        (
            "wte wpe",
            "ln_1 attn.attention.k_proj attn.attention.v_proj attn.attention.q_proj attn.attention.out_proj ln_2 "
            "mlp.c_fc mlp.c_proj",
            "ln_f",
        ),
        gelu_tanh="gelu_new", aliases={"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"},
        beside=("attention_layers",),  # which the class computes from attention_types
    ),
    "opt": Family(
        "OPTForCausalLM", "model.decoder.", "lm_head.weight",
        {
            "num_hidden_layers": "num_layers", "hidden_size": "hidden_size", "num_attention_heads": "num_heads",
            "ffn_dim": "mlp_size", "max_position_embeddings": "max_positions", "activation_function": "activation",
            "dropout": "hidden_dropout", "attention_dropout": "attention_dropout", "word_embed_proj_dim": "same_width",
            "do_layer_norm_before": True, "enable_bias": True, "layer_norm_elementwise_affine": True,
        },
        {"position": "learned", "position_offset": 2, "norm_eps": 1e-5},
        GPT_HOLDS | {
            "position": {"learned"}, "position_offset": {2}, "norm_eps": {1e-5}, "attention_bias": {True},
        },
        {
            "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072,
            "max_position_embeddings": 2048, "num_attention_heads": 12, "activation_function": "relu", "dropout": 0.1,
            "attention_dropout": 0.0, "do_layer_norm_before": True, "enable_bias": True,
            "layer_norm_elementwise_affine": True, "tie_word_embeddings": True,
        },
        by_module(
            "layers.{i}.",
            {
                "norm1": "self_attn_layer_norm", "norm2": "final_layer_norm", "attn.qkv": PROJECTIONS,
                "attn.out": "self_attn.out_proj", "mlp.up": "fc1", "mlp.down": "fc2",
            },
            {"embed": "embed_tokens", "positions": "embed_positions", "norm": "final_layer_norm"},
        ),
        (
            "embed_tokens embed_positions final_layer_norm",
            "self_attn.k_proj self_attn.v_proj self_attn.q_proj self_attn.out_proj self_attn_layer_norm fc1 fc2 "
            "final_layer_norm",
            "",
        ),
        refused=("_remove_final_layer_norm", "layerdrop"),
    ),
    "bloom": Family(
        "BloomForCausalLM", "transformer.", "lm_head.weight",
        {
            "n_layer": "num_layers", "hidden_size": "hidden_size", "n_head": "num_heads",
            "layer_norm_epsilon": "norm_eps", "hidden_dropout": "hidden_dropout",
            "attention_dropout": "attention_dropout", "apply_residual_connection_post_layernorm": False,
        },
        {"position": "alibi", "embedding_norm": True, "activation": "gelu_tanh"},
        GPT_HOLDS | {
            "position": {"alibi"}, "embedding_norm": {True}, "attention_bias": {True}, "activation": {"gelu_tanh"},
        },
        {
            "vocab_size": 250880, "hidden_size": 64, "n_layer": 2, "n_head": 8, "layer_norm_epsilon": 1e-5,
            "hidden_dropout": 0.0, "attention_dropout": 0.0, "apply_residual_connection_post_layernorm": False,
            "tie_word_embeddings": True,
        },
        by_module(
            "h.{i}.",
            BEFORE | {
                "attn.qkv": "self_attention.query_key_value", "attn.out": "self_attention.dense",
                "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h",
            },
            {"embed": "word_embeddings", "embed_norm": "word_embeddings_layernorm", "norm": "ln_f"},
            lambda model: Same(),
        ),
        (
            "word_embeddings word_embeddings_layernorm",
            "input_layernorm self_attention.query_key_value self_attention.dense post_attention_layernorm "
            "mlp.dense_h_to_4h mlp.dense_4h_to_h",
            "ln_f",
        ),
        aliases={"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "n_embed": "hidden_size"},
        beside=(
            "attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "offset_alibi", "seq_length",
            "skip_bias_add", "skip_bias_add_qkv",  # of the program that trained the published ones
        ),
    ),
}  # fmt: skip
