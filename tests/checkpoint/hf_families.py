"""Tiny random models of every model type, made by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
LOCAL = {"attention_types": [[["global", "local"], 2]], "window_size": 5}
NEO = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 64}
OPT = {key: value for key, value in SIZES.items() if key != "intermediate_size"} | {"ffn_dim": 48}
FEW_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3}
WIDTHS = {"moe_intermediate_size": 24}
GLM = WIDTHS | {"n_routed_experts": 6, "num_experts_per_tok": 3}
HALF_ROTARY = {"rope_theta": 500.0, "partial_rotary_factor": 0.5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # the first of each model type is its usual form
    "gpt_neox": ("gpt_neox", SIZES),
    "gpt2": ("gpt2", GPT),
    "llama": ("llama", GROUPED),
    "llama with wide heads": ("llama", GROUPED | {"head_dim": 12}),
    "mistral": ("mistral", GROUPED | {"sliding_window": 5}),
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("olmoe", GROUPED | FEW_EXPERTS),
    "olmoe with biases, shares of one": (
        "olmoe", SIZES | FEW_EXPERTS | {"attention_bias": True, "norm_topk_prob": True},
    ),
    "qwen2_moe": ("qwen2_moe", GROUPED | FEW_EXPERTS | WIDTHS | {"shared_expert_intermediate_size": 16}),
    "qwen2_moe with windows, every other block": (
        "qwen2_moe",
        GROUPED | FEW_EXPERTS | WIDTHS | WINDOW
        | {"shared_expert_intermediate_size": 16, "max_window_layers": 3, "qkv_bias": False, "norm_topk_prob": True,
           "decoder_sparse_step": 2},
    ),
    "qwen3_moe": ("qwen3_moe", GROUPED | FEW_EXPERTS | WIDTHS | {"head_dim": 12, "norm_topk_prob": True}),
    "qwen3_moe with windows, some blocks": (
        "qwen3_moe",
        SIZES | FEW_EXPERTS | WIDTHS | WINDOW
        | {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True, "mlp_only_layers": [0]},
    ),
    "glm4_moe": ("glm4_moe", GROUPED | GLM | {"head_dim": 12, "use_qk_norm": True, "n_shared_experts": 2}),
    "glm4_moe with biases, plain shares": (
        "glm4_moe",
        GROUPED | GLM
        | {"attention_bias": True, "norm_topk_prob": False, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3},
    ),
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 8}),
    "qwen2": ("qwen2", GROUPED),
    "qwen2 windows": ("qwen2", GROUPED | WINDOW | {"max_window_layers": 2, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3 windows, biases": ("qwen3", GROUPED | WINDOW | {"max_window_layers": 1, "attention_bias": True}),
    "gemma": ("gemma", SIZES | {"num_key_value_heads": 1, "head_dim": 12}),
    "gemma2": (
        "gemma2",
        GROUPED | {"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 6, "attn_logit_softcapping": 1.0,
                   "final_logit_softcapping": 3.0},
    ),
    "gemma2 without caps": (
        "gemma2",
        GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": None,
                   "final_logit_softcapping": None, "layer_types": ["full_attention"] * 4, "attention_bias": True},
    ),
    "gemma2 for llama.cpp": (
        "gemma2",
        GROUPED | {"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 1.0,
                   "final_logit_softcapping": 3.0},
    ),
    "phi": ("phi", SIZES),
    "phi with qk norms, grouped": ("phi", GROUPED | {"qk_layernorm": True} | HALF_ROTARY),
    "gptj": ("gptj", GPT | {"rotary_dim": 4}),
    "gptj all rotary": ("gptj", GPT | {"rotary_dim": 8, "n_inner": 48}),
    "olmo": ("olmo", GROUPED | {"clip_qkv": 0.3, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", GROUPED),
    "olmo2 biases": ("olmo2", SIZES | {"attention_bias": True}),
    "stablelm": ("stablelm", GROUPED),
    "stablelm 2": ("stablelm", GROUPED | {"use_qkv_bias": True}),
    "stablelm 2, 12B": ("stablelm", GROUPED | {"use_parallel_residual": True, "qk_layernorm": True}),
    "smollm3": ("smollm3", GROUPED | {"no_rope_layer_interval": 2}),
    "smollm3 for llama.cpp": ("smollm3", GROUPED | {"no_rope_layer_interval": 4}),
    "smollm3 windows": ("smollm3", GROUPED | WINDOW | {"no_rope_layers": [1, 0, 0, 1], "mlp_bias": True}),
    "gpt_neo": ("gpt_neo", NEO | LOCAL),
    "gpt_neo global": ("gpt_neo", NEO | {"attention_types": [[["global"], 4]]}),
    "opt": ("opt", OPT),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "bloom with six heads": ("bloom", {"hidden_size": 36, "n_layer": 2, "n_head": 6}),
}  # fmt: skip
USUAL = [name for name in CASES if name == CASES[name][0]]


def saved(case: str, folder: Path, vocab_size: int = 97) -> transformers.PreTrainedModel:
    """A random model whose biases are not zeros and whose norms are not ones, saved in `folder`."""
    kind, options = CASES[case]
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = transformers.AutoConfig.for_model(kind, **{"vocab_size": vocab_size, **ids, **options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
    model.save_pretrained(folder)
    return model


def opened(folder: Path) -> transformers.PreTrainedModel:
    """A folder as transformers opens it."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
