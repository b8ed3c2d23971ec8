"""What llama.cpp's architectures call our tensors, how they order rows, and which models they compute.

Sources: src/models and src/llama-arch.cpp at ggml-org/llama.cpp.
"""

from __future__ import annotations

from castalia.checkpoint.formats.gguf.dense_architectures import BIASES, DENSE, EVERY, GELU, Architecture, all_by_kind
from castalia.checkpoint.formats.huggingface.model_type import by_group
from castalia.checkpoint.formats.huggingface.names import lacking
from castalia.checkpoint.rules import Chain, Each, PermuteRows, Rule, Same, per_block, with_bias
from castalia.config.schema import ModelConfig
from castalia.errors import CheckpointError

HEAD, HEAD_BIAS = "output.weight", "output.bias"
LLAMA3_FACTORS = "rope_freqs.weight"  # by which Llama 3 divides the frequencies, one for each rotating pair


def _fused_rules(model: ModelConfig) -> list[Rule]:
    """gptneox and gpt2: one matrix with all queries, all keys, all values; the rows of a head are in our order."""
    block = [
        *with_bias("blocks.{i}.norm1", "blk.{i}.attn_norm"),
        *with_bias("blocks.{i}.norm2", "blk.{i}.ffn_norm"),
        *with_bias("blocks.{i}.attn.qkv", "blk.{i}.attn_qkv", all_by_kind(model), bias=model.attention_bias),
        *with_bias("blocks.{i}.attn.out", "blk.{i}.attn_output", bias=model.attention_bias),
        *with_bias("blocks.{i}.mlp.up", "blk.{i}.ffn_up", bias=model.mlp_bias),
        *with_bias("blocks.{i}.mlp.down", "blk.{i}.ffn_down", bias=model.mlp_bias),
    ]
    learned = [Rule("positions.weight", "position_embd.weight")] if model.position == "learned" else []
    ends = [Rule("embed.weight", "token_embd.weight"), *learned, *with_bias("norm", "output_norm")]
    return ends + per_block(block, model.num_layers)


def _llama_rules(model: ModelConfig) -> list[Rule]:
    """llama: three matrices. It rotates row 2j of a head together with row 2j + 1, we row j with row j + half."""

    def rotating(heads: int) -> PermuteRows:
        return PermuteRows((heads, model.head_size // 2, 2), (0, 2, 1))

    qkv = Chain(Each((rotating(model.num_heads), rotating(model.kv_heads), Same())), by_group(model))
    block = [
        Rule("blocks.{i}.norm1.weight", "blk.{i}.attn_norm.weight"),
        Rule("blocks.{i}.norm2.weight", "blk.{i}.ffn_norm.weight"),
        *with_bias(
            "blocks.{i}.attn.qkv", "blk.{i}.attn_q blk.{i}.attn_k blk.{i}.attn_v", qkv, bias=model.attention_bias
        ),
        *with_bias("blocks.{i}.attn.out", "blk.{i}.attn_output", bias=model.attention_bias),
        *with_bias("blocks.{i}.mlp.gate", "blk.{i}.ffn_gate", bias=model.mlp_bias),
        *with_bias("blocks.{i}.mlp.up", "blk.{i}.ffn_up", bias=model.mlp_bias),
        *with_bias("blocks.{i}.mlp.down", "blk.{i}.ffn_down", bias=model.mlp_bias),
    ]
    ends = [Rule("embed.weight", "token_embd.weight"), Rule("norm.weight", "output_norm.weight")]
    return ends + per_block(block, model.num_layers)


ARCHITECTURES = {
    "gptneox": Architecture(
        _fused_rules, {"position": "rotary", "norm": "layernorm", "activation": "gelu_tanh"},
        EVERY | GELU | {"position": {"rotary"}}, ("linear", "yarn"), (*BIASES, "tie_embeddings"),
    ),
    "gpt2": Architecture(
        _fused_rules, {"position": "learned", "norm": "layernorm", "activation": "gelu_tanh"},
        EVERY | GELU | {"position": {"learned"}, "parallel_residual": {False}}, (), BIASES,
    ),
    "llama": Architecture(
        _llama_rules, {"position": "rotary", "norm": "rmsnorm", "activation": "silu", "gated_mlp": True},
        EVERY | {"position": {"rotary"}, "norm": {"rmsnorm"}, "gated_mlp": {True}, "activation": {"silu"},
                 "parallel_residual": {False}, "rotary_pct": {1.0}},
        ("linear", "yarn", "llama3"),
    ),
    **DENSE,
}  # fmt: skip


def table(name: str, model: ModelConfig) -> list[Rule]:
    """All rules of a model."""
    bias = [Rule("head.bias", HEAD_BIAS)] if model.head_bias else []
    return ARCHITECTURES[name].rules(model) + ([] if model.tie_embeddings else [Rule("head.weight", HEAD), *bias])


def architecture_of(model: ModelConfig, path: str) -> str:
    """The architecture that computes the model. Raises CheckpointError, with all reasons, if none does."""
    seen = model
    if model.sliding_window and model.max_positions and model.sliding_window + 1 >= model.max_positions:
        seen = model.with_({"sliding_window": None})  # a window as long as the longest sequence hides nothing
    reasons = {name: not_computed(seen, each) for name, each in ARCHITECTURES.items()}
    nearest = min(reasons, key=lambda name: len(reasons[name]))
    if reasons[nearest]:
        raise CheckpointError(
            f"{path}: llama.cpp does not compute this model. Its nearest architecture, {nearest}, cannot do "
            f"{'; '.join(reasons[nearest])}. --to native keeps everything"
        )
    return nearest


def not_computed(model: ModelConfig, architecture: Architecture) -> list[str]:
    """The settings of the model that the architecture does not compute."""
    scale = {"embedding_multiplier": {model.hidden_size**0.5}} if architecture.scales_embedding else {}
    found = lacking(model, {**architecture.holds, **scale}) + _scaling(model, architecture)
    return found + architecture.lacks(model)


def _scaling(model: ModelConfig, architecture: Architecture) -> list[str]:
    scaling = model.rope_scaling
    if scaling is None or model.position != "rotary":
        return []
    if scaling.kind not in architecture.scalings:
        return [f"model.rope_scaling.kind={scaling.kind} (only {' or '.join(architecture.scalings) or 'none'})"]
    if scaling.kind == "yarn" and (scaling.beta_fast, scaling.beta_slow) != (32.0, 1.0):
        return [f"model.rope_scaling.beta_fast={scaling.beta_fast}, beta_slow={scaling.beta_slow} (only 32.0 and 1.0)"]
    return []
