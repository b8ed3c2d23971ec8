"""What Hugging Face's model types call our settings and tensors, and which models their classes compute.

Each `Family` is read in both directions: `config_json.py` reads and writes settings by `keys`, `read.py` and `write.py`
tensors by `rules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from castalia.checkpoint.formats.huggingface.dense_families import DENSE, GPT_ALIASES
from castalia.checkpoint.formats.huggingface.mixtures import MIXTURES, plain_experts
from castalia.checkpoint.formats.huggingface.model_type import ACTIVATIONS, SCORE, Family, by_group
from castalia.checkpoint.mamba_tensors import mamba_rules
from castalia.checkpoint.rules import (
    Chain,
    PermuteRows,
    Rule,
    Transpose,
    per_block,
    with_bias,
)
from castalia.config.schema import ExpertsConfig, ModelConfig, is_balance, shortest
from castalia.errors import CheckpointError


def _neox_rules(model: ModelConfig) -> list[Rule]:
    layer = "layers.{i}."
    block = [
        *with_bias("blocks.{i}.norm1", layer + "input_layernorm"),
        *with_bias("blocks.{i}.norm2", layer + "post_attention_layernorm"),
        *with_bias("blocks.{i}.attn.qkv", layer + "attention.query_key_value", bias=model.attention_bias),
        *with_bias("blocks.{i}.attn.out", layer + "attention.dense", bias=model.attention_bias),
        *with_bias("blocks.{i}.mlp.up", layer + "mlp.dense_h_to_4h"),
        *with_bias("blocks.{i}.mlp.down", layer + "mlp.dense_4h_to_h"),
    ]
    ends = [Rule("embed.weight", "embed_in.weight"), *with_bias("norm", "final_layer_norm")]
    return ends + per_block(block, model.num_layers)


def _gpt2_rules(model: ModelConfig) -> list[Rule]:
    heads, size = model.num_heads, model.head_size
    # From all queries, all keys, all values to one head after another.
    by_head = PermuteRows((3, heads, size), (1, 0, 2))
    layer = "h.{i}."
    block = [
        *with_bias("blocks.{i}.norm1", layer + "ln_1"),
        *with_bias("blocks.{i}.norm2", layer + "ln_2"),
        Rule("blocks.{i}.attn.qkv.weight", layer + "attn.c_attn.weight", Chain(Transpose(), by_head)),
        Rule("blocks.{i}.attn.qkv.bias", layer + "attn.c_attn.bias", by_head),
        Rule("blocks.{i}.attn.out.weight", layer + "attn.c_proj.weight", Transpose()),
        Rule("blocks.{i}.attn.out.bias", layer + "attn.c_proj.bias"),
        Rule("blocks.{i}.mlp.up.weight", layer + "mlp.c_fc.weight", Transpose()),
        Rule("blocks.{i}.mlp.up.bias", layer + "mlp.c_fc.bias"),
        Rule("blocks.{i}.mlp.down.weight", layer + "mlp.c_proj.weight", Transpose()),
        Rule("blocks.{i}.mlp.down.bias", layer + "mlp.c_proj.bias"),
    ]
    ends = [Rule("embed.weight", "wte.weight"), Rule("positions.weight", "wpe.weight"), *with_bias("norm", "ln_f")]
    return ends + per_block(block, model.num_layers)


def _llama_rules(model: ModelConfig) -> list[Rule]:
    layer, attention = "layers.{i}.", "layers.{i}.self_attn."
    projections = " ".join(attention + name for name in ("q_proj", "k_proj", "v_proj"))
    block = [
        Rule("blocks.{i}.norm1.weight", layer + "input_layernorm.weight"),
        Rule("blocks.{i}.norm2.weight", layer + "post_attention_layernorm.weight"),
        *with_bias("blocks.{i}.attn.qkv", projections, by_group(model), bias=model.attention_bias),
        *with_bias("blocks.{i}.attn.out", attention + "o_proj", bias=model.attention_bias),
        *with_bias("blocks.{i}.mlp.gate", layer + "mlp.gate_proj", bias=model.mlp_bias),
        *with_bias("blocks.{i}.mlp.up", layer + "mlp.up_proj", bias=model.mlp_bias),
        *with_bias("blocks.{i}.mlp.down", layer + "mlp.down_proj", bias=model.mlp_bias),
    ]
    ends = [Rule("embed.weight", "embed_tokens.weight"), Rule("norm.weight", "norm.weight")]
    return ends + per_block(block, model.num_layers)


def _mamba_rules(model: ModelConfig) -> list[Rule]:
    layer = "layers.{i}."
    block = [Rule("blocks.{i}.norm1.weight", layer + "norm.weight"), *mamba_rules(model, layer + "mixer.")]
    ends = [Rule("embed.weight", "embeddings.weight"), Rule("norm.weight", "norm_f.weight")]
    return ends + per_block(block, model.num_layers)


_KEYS = {
    "num_hidden_layers": "num_layers", "hidden_size": "hidden_size", "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_size", "max_position_embeddings": "max_positions", "hidden_act": "activation",
    "attention_bias": "attention_bias", "attention_dropout": "attention_dropout",
    # Rotary embeddings in both spellings: flat keys with `rope_scaling`, and the `rope_parameters` of recent versions.
    "rope_theta": "rotary_base", "partial_rotary_factor": "rotary_pct", "rope_scaling": "rope_scaling",
    "rope_parameters": "rope_scaling",
}  # fmt: skip
NEOX_KEYS = _KEYS | {
    "rotary_pct": "rotary_pct", "rotary_emb_base": "rotary_base", "layer_norm_eps": "norm_eps",
    "use_parallel_residual": "parallel_residual", "hidden_dropout": "hidden_dropout embedding_dropout",
}  # fmt: skip
GPT2_KEYS: dict[str, str | bool] = {
    "n_layer": "num_layers", "n_embd": "hidden_size", "n_head": "num_heads", "n_inner": "mlp_size",
    "n_positions": "max_positions", "n_ctx": "max_positions",  # its first name, which some programs still read
    "activation_function": "activation", "layer_norm_epsilon": "norm_eps", "embd_pdrop": "embedding_dropout",
    "resid_pdrop": "hidden_dropout", "attn_pdrop": "attention_dropout", "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}  # fmt: skip
LLAMA_KEYS = _KEYS | {
    "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim", "rms_norm_eps": "norm_eps", "mlp_bias": "mlp_bias",
}  # fmt: skip
MISTRAL_KEYS = LLAMA_KEYS | {"sliding_window": "sliding_window"}
MAMBA_KEYS: dict[str, str | bool] = {
    "num_hidden_layers": "num_layers", "hidden_size": "hidden_size", "layer_norm_epsilon": "norm_eps",
    # Together one section of ours.
    **dict.fromkeys(
        ("state_size", "conv_kernel", "expand", "time_step_rank", "use_conv_bias", "hidden_act", "residual_in_fp32"),
        "mamba",
    ),
    "use_bias": False,
}  # fmt: skip
NEOX_DEFAULTS = {
    "vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
    "intermediate_size": 24576, "hidden_act": "gelu", "partial_rotary_factor": 0.25, "rope_theta": 10000.0,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "max_position_embeddings": 2048, "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False, "use_parallel_residual": True, "attention_bias": True,
}  # fmt: skip
GPT2_DEFAULTS = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
    "activation_function": "gelu_new", "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu", "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
    "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
}  # fmt: skip
MISTRAL_DEFAULTS = LLAMA_DEFAULTS | {
    "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
}  # fmt: skip
MAMBA_DEFAULTS = {
    "vocab_size": 50280, "hidden_size": 768, "state_size": 16, "num_hidden_layers": 32, "layer_norm_epsilon": 1e-5,
    "expand": 2, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "hidden_act": "silu",
    "residual_in_fp32": True, "time_step_rank": "auto", "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_FIXED = {"norm": "rmsnorm", "gated_mlp": True, "sliding_window": None}
LLAMA_HOLDS: dict[str, set | None] = {
    "norm": {"rmsnorm"}, "rms_eps_inside": {True}, "position": {"rotary"}, "rotary_pct": {1.0}, "gated_mlp": {True},
    "parallel_residual": {False}, "qk_norm": {False}, "head_dim": None,
}  # fmt: skip
MAMBA_FIXED = {"pattern": ("mamba",), "norm": "rmsnorm", "position": "none", "num_heads": 1}
# Positions that act in attention alone, and all that an MLP has, change nothing.
MAMBA_HOLDS: dict[str, set | None] = {
    "pattern": {("mamba",)}, "norm": {"rmsnorm"}, "rms_eps_inside": {True}, "reward_head": {False},
    "position": {"none", "rotary", "alibi"}, "gated_mlp": {False, True}, "qk_norm": {False, True},
}  # fmt: skip
NEOX_HOLDS: dict[str, set | None] = {
    "norm": {"layernorm"}, "position": {"rotary"}, "gated_mlp": {False}, "shared_norm": {False},
    "num_kv_heads": {None}, "mlp_bias": {True}, "qk_norm": {False}, "sliding_window": {None},
}  # fmt: skip
GPT2_HOLDS: dict[str, set | None] = {
    "norm": {"layernorm"}, "position": {"learned"}, "gated_mlp": {False}, "parallel_residual": {False},
    "num_kv_heads": {None}, "attention_bias": {True}, "mlp_bias": {True}, "qk_norm": {False},
    "sliding_window": {None},
}  # fmt: skip
NEOX_MODULES = (
    "embed_in",
    "input_layernorm post_attention_layernorm attention.query_key_value attention.dense mlp.dense_h_to_4h "
    "mlp.dense_4h_to_h",
    "final_layer_norm",
)
GPT2_MODULES = ("wte wpe", "ln_1 attn.c_attn attn.c_proj ln_2 mlp.c_fc mlp.c_proj", "ln_f")
LLAMA_MODULES = (
    "embed_tokens",
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj "
    "input_layernorm post_attention_layernorm",
    "norm",
)
FAMILIES = {
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", "gpt_neox.", "embed_out.weight", NEOX_KEYS, {}, NEOX_HOLDS, NEOX_DEFAULTS, _neox_rules,
        NEOX_MODULES, head_modules=("lm_head", "embed_out"), gelu_tanh="gelu_fast", beside=("head_dim",),
    ),
    "gpt2": Family(
        "GPT2LMHeadModel", "transformer.", "lm_head.weight", GPT2_KEYS, {"position": "learned"}, GPT2_HOLDS,
        GPT2_DEFAULTS, _gpt2_rules, GPT2_MODULES, gelu_tanh="gelu_new", aliases=GPT_ALIASES,
    ),
    "llama": Family(
        "LlamaForCausalLM", "model.", "lm_head.weight", LLAMA_KEYS, LLAMA_FIXED,
        LLAMA_HOLDS | {"sliding_window": {None}}, LLAMA_DEFAULTS, _llama_rules, LLAMA_MODULES,
    ),
    "mistral": Family(
        "MistralForCausalLM", "model.", "lm_head.weight", MISTRAL_KEYS, LLAMA_FIXED,
        LLAMA_HOLDS | {"attention_bias": {False}, "mlp_bias": {False}}, MISTRAL_DEFAULTS, _llama_rules,
        LLAMA_MODULES, foreign=("attention_bias", "mlp_bias"),
    ),
    "mamba": Family(
        "MambaForCausalLM", "backbone.", "lm_head.weight", MAMBA_KEYS, MAMBA_FIXED, MAMBA_HOLDS, MAMBA_DEFAULTS,
        _mamba_rules, ("", "", ""), aliases={"n_layer": "num_hidden_layers", "d_model": "hidden_size"},
        beside=(
            "time_step_min", "time_step_max", "time_step_floor", "time_step_scale", "time_step_init_scheme",
            "rescale_prenorm_residual", "use_mambapy", "use_associative_scan", "fused_add_norm", "rms_norm", "ssm_cfg",
            "intermediate_size", "d_inner", "layer_types",  # which the class computes from others
        ),
    ),
    **MIXTURES,
    **DENSE,
}  # fmt: skip
# Settings that every class has a key for, or that change nothing about what the model computes. A model whose other
# settings are not the defaults fits no class.
FREE = {
    "num_layers", "hidden_size", "num_heads", "mlp_size", "vocab_size", "vocab_multiple", "max_positions", "norm_eps",
    "rotary_base", "rotary_pct", "rope_scaling", "activation", "attention_bias", "parallel_residual", "tie_embeddings",
    "shared_norm", "mlp_bias", "rms_eps_inside", "embedding_dropout", "hidden_dropout", "attention_dropout", "init",
    "init_passes", "init_method", "output_init_method", "init_std", "num_kv_heads", "sliding_window", "reward_head",
    "mamba", "amlp_size", "rwkv", "rwkv_over",  # which act where there are such blocks
    "experts.count", "experts.top_k", "experts.width", "experts.balance_rate", "experts.sinkhorn_stop",
}  # fmt: skip


def table(family: Family, model: ModelConfig) -> list[Rule]:
    """All rules of a model. Names of the format are without the family's prefix."""
    if model.reward_head:
        return [*family.rules(model), Rule("reward.weight", SCORE)]
    bias = [Rule("head.bias", family.head.removesuffix("weight") + "bias")] if model.head_bias else []
    return family.rules(model) + ([] if model.tie_embeddings else [Rule("head.weight", family.head), *bias])


def state_table(family: Family, model: ModelConfig) -> list[Rule]:
    """The rules of the tensors that an optimizer holds a state of: all but biases for balancing, which no gradient
    changes."""
    return [rule for rule in table(family, model) if not is_balance(rule.ours)]


def family_of(model: ModelConfig, path: str) -> str:
    """The first model type whose class can compute the model. Raises CheckpointError if none can."""
    lacking, mixed = {kind: _lacking(model, kind) for kind in FAMILIES}, model.experts is not None
    # Of a mixture that no class computes, a class with experts says what it differs in, and of others one without.
    nearest = min(lacking, key=lambda kind: (_has_mixtures(FAMILIES[kind].holds) != mixed, len(lacking[kind])))
    if lacking[nearest]:
        raise CheckpointError(
            f"{path}: no Hugging Face class computes this model. The nearest, {FAMILIES[nearest].class_name}, cannot "
            f"do {'; '.join(lacking[nearest])}. --to native keeps everything"
        )
    return nearest


def _lacking(model: ModelConfig, kind: str) -> list[str]:
    """The settings whose values the class cannot compute, each with the values that it can."""
    scale = {"embedding_multiplier": {model.hidden_size**0.5}} if FAMILIES[kind].scales_embedding else {}
    result = lacking(model, {**FAMILIES[kind].holds, **scale})
    if kind == "gemma2" and (own := model.attention_scale) and round(own**-2) ** -0.5 != own:
        result.append(f"model.attention_scale={own} (only one over the root of a whole number)")
    if kind == "glm4_moe" and model.experts and (model.experts.shared_width or 1) % model.expert_width:
        width = model.experts.shared_width
        result.append(f"model.experts.shared_width={width} (only multiples of experts.width={model.expert_width})")
    if kind == "mamba":
        if model.mamba_sizes.linear_bias:
            result.append("model.mamba.linear_bias=True (only False)")
        if model.mamba_width % model.hidden_size:
            result.append(f"model.mamba.width={model.mamba_width} (only multiples of {model.hidden_size})")
    elif model.activation not in ACTIVATIONS.values():
        result.append(f"model.activation={model.activation} (only {', '.join(dict.fromkeys(ACTIVATIONS.values()))})")
    return result


def lacking(model: ModelConfig, holds: Mapping[str, set | None]) -> list[str]:
    """The settings whose values are not among those that another program's class `holds`, each with these values."""
    values = {**model.model_dump(), "shared_norm": model.has_one_norm, "pattern": shortest(model.pattern)}
    values["num_kv_heads"] = None if model.kv_heads == model.num_heads else model.kv_heads
    values["rms_eps_inside"] = model.rms_eps_inside or model.norm != "rmsnorm"
    values |= plain_values(model)
    if "attention_out_bias" in holds:
        values["attention_out_bias"] = model.out_bias
    defaults = {key: field.default for key, field in ModelConfig.model_fields.items()}
    if _has_mixtures(holds):
        if model.experts is None:
            return ["models without model.experts"]
        if "dense" not in model.layer_kinds:  # there is no MLP that these are of
            values |= {"gated_mlp": True, "mlp_bias": False}
        values |= {f"experts.{key}": value for key, value in plain_experts(model).model_dump().items()}
        defaults |= {f"experts.{key}": field.default for key, field in ExpertsConfig.model_fields.items()}
        del defaults["experts"]
    # Settings that mean nothing in this model.
    idle: tuple[str, ...] = () if model.parallel_residual else ("shared_norm",)
    idle += () if model.position == "rotary" else ("rotary_pct", "rope_scaling")
    holds = {key: allowed for key, allowed in holds.items() if key not in idle}
    result = [
        f"model.{key}={values[key]} (only {' or '.join(str(value) for value in allowed)})"
        for key, allowed in holds.items()
        if allowed is not None and values[key] not in list(allowed)  # some values are dicts
    ]
    return result + [
        f"model.{key}" + ("" if isinstance(values[key], dict) else f"={values[key]}")  # whole sections by name
        for key, default in defaults.items()
        if key not in FREE and key not in holds and values[key] != default
    ]


def _has_mixtures(holds: Mapping[str, set | None]) -> bool:
    """Whether a class that holds these settings has blocks with experts."""
    return any(key.startswith("experts.") for key in holds)


def plain_values(model: ModelConfig) -> dict[str, Any]:
    """Settings that have several values for the same model, each with the plainest."""
    windows = shortest([model.window_of(layer) is not None for layer in range(model.num_layers)])
    turning = shortest([model.rotates(layer) for layer in range(model.num_layers)])
    usual = model.head_size * model.num_heads == model.hidden_size
    return {
        "head_dim": None if usual else model.head_dim,
        "attention_out_bias": None if model.out_bias == model.attention_bias else model.out_bias,
        "sliding_window": model.sliding_window if any(windows) else None,
        "window_pattern": windows if any(windows) else (True,),
        "rotary_pattern": turning if model.position == "rotary" else (True,),
        "position_offset": model.position_offset if model.position == "learned" else 0,
    }
