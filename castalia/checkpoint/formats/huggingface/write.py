"""Writing Hugging Face folders: the class that holds the architecture, and everything that `transformers` opens.

Beside the weights lies what `transformers` has no place for, so that reading the folder again loses nothing:
`optimizer.safetensors` (tensors `name.exp_avg` and so on, by the weights' names) and `castalia.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from castalia.checkpoint.file_plan import (
    OutputFile,
    Plan,
    WriteOptions,
    json_output,
    json_text,
    named_groups,
    shards,
    tensors_output,
    write_bytes,
)
from castalia.checkpoint.formats.huggingface.read import BESIDE, CONFIG, FAMILIES, ROLES, Family, table
from castalia.checkpoint.restore import architecture
from castalia.checkpoint.rules import Role, to_theirs
from castalia.checkpoint.sampled_values import fingerprint
from castalia.checkpoint.tensors import Checkpoint
from castalia.checkpoint.tokenizer_files import hf_tokenizer
from castalia.config.schema import ModelConfig, RopeScaling
from castalia.errors import CheckpointError
from castalia.storage.lazy import TensorRef
from castalia.storage.safetensors import open_safetensors

CLASSES = {
    "gpt_neox": "GPTNeoXForCausalLM", "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}  # fmt: skip
# What each class computes. A key that is not listed may have any value.
LLAMA: dict[str, set] = {
    "norm": {"rmsnorm"}, "rms_eps_inside": {True}, "position": {"rotary"}, "rotary_pct": {1.0}, "gated_mlp": {True},
    "parallel_residual": {False}, "qk_norm": {False},
}  # fmt: skip
HOLDS: dict[str, dict[str, set]] = {
    "gpt_neox": {
        "norm": {"layernorm"}, "position": {"rotary"}, "gated_mlp": {False}, "shared_norm": {False},
        "num_kv_heads": {None}, "mlp_bias": {True}, "qk_norm": {False}, "sliding_window": {None},
    },
    "gpt2": {
        "norm": {"layernorm"}, "position": {"learned"}, "gated_mlp": {False}, "parallel_residual": {False},
        "num_kv_heads": {None}, "attention_bias": {True}, "mlp_bias": {True}, "qk_norm": {False},
        "sliding_window": {None},
    },
    "llama": LLAMA | {"sliding_window": {None}},
    "mistral": LLAMA | {"attention_bias": {False}, "mlp_bias": {False}},
}  # fmt: skip
# What every class has a key for, or what changes nothing about the function. Other settings must have their defaults.
FREE = {
    "num_layers", "hidden_size", "num_heads", "mlp_size", "vocab_size", "vocab_multiple", "max_positions", "norm_eps",
    "rotary_base", "rotary_pct", "rope_scaling", "activation", "attention_bias", "parallel_residual", "tie_embeddings",
    "shared_norm", "mlp_bias", "rms_eps_inside", "embedding_dropout", "hidden_dropout", "attention_dropout", "init",
    "init_passes", "init_method", "output_init_method", "init_std", "num_kv_heads", "sliding_window",
}  # fmt: skip
ACTIVATIONS = {
    "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu", "mish": "mish",
    "sigmoid": "sigmoid", "identity": "linear",
}  # fmt: skip
TANH_GELU = {"gpt_neox": "gelu_fast", "gpt2": "gelu_new"}  # as the published models of these classes call it


def plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    """The files of a folder. Raises CheckpointError for a model that no class computes."""
    model = architecture(checkpoint)
    kind = family_of(model, checkpoint.path)
    family = FAMILIES[kind]
    tokenizer, ids, notes = hf_tokenizer(checkpoint)
    weights = _named(checkpoint.model, family, model, "weight")
    config = hf_config(kind, model, _longest(checkpoint, model), ids)
    config["torch_dtype"] = config["dtype"] = checkpoint.model["embed.weight"].dtype_name
    weight_outputs = _safetensors("model", weights, options)
    weight_files = [output.name for output in weight_outputs if output.name.endswith(".safetensors")]
    outputs = [json_output(CONFIG, config), *tokenizer, *weight_outputs]
    outputs += _optimizer(checkpoint, family, model, options)
    if kind == "gpt_neox" and model.embedding_dropout != model.hidden_dropout:
        dropout = f"one dropout for embedding and blocks: {model.hidden_dropout}, not {model.embedding_dropout}"
        notes = (*notes, f"config.json has {dropout}")

    def finish(folder: Path, results: Mapping[str, Any]) -> None:
        """What is beside the weights says of which weights it is, so that it is not believed of others."""
        written = {name: ref for file in weight_files for name, ref in open_safetensors(folder / file).items()}
        value = {**_beside(checkpoint), "fingerprint": fingerprint(written)}
        write_bytes(folder / BESIDE, json_text(value).encode(), lambda count: None)

    return Plan(tuple(outputs), notes, finish)


def family_of(model: ModelConfig, path: str) -> str:
    """The first model_type whose class computes what the model does."""
    lacking = {kind: _lacking(model, kind) for kind in FAMILIES}
    nearest = min(lacking, key=lambda kind: len(lacking[kind]))
    if lacking[nearest]:
        raise CheckpointError(
            f"{path}: no Hugging Face class computes this model. The nearest, {CLASSES[nearest]}, cannot do "
            f"{'; '.join(lacking[nearest])}. --to native keeps everything"
        )
    return nearest


def _lacking(model: ModelConfig, kind: str) -> list[str]:
    """What the class cannot hold: setting, value, and what it has instead."""
    found = {**model.model_dump(), "shared_norm": model.parallel_residual and model.shared_norm}
    found["num_kv_heads"] = None if model.kv_heads == model.num_heads else model.kv_heads
    found["rms_eps_inside"] = model.rms_eps_inside or model.norm != "rmsnorm"
    result = [
        f"model.{key}={found[key]} (only {' or '.join(str(value) for value in allowed)})"
        for key, allowed in HOLDS[kind].items()
        if found[key] not in allowed
    ]
    result += [
        f"model.{key}={found[key]}"
        for key, field in ModelConfig.model_fields.items()
        if key not in FREE and key not in HOLDS[kind] and found[key] != field.default
    ]
    if model.activation not in ACTIVATIONS:
        result.append(f"model.activation={model.activation} (only {', '.join(ACTIVATIONS)})")
    return result


def hf_config(kind: str, model: ModelConfig, longest: int, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """config.json; values that are the class's defaults are written too, since versions differ in them."""
    activation = ACTIVATIONS[model.activation]
    activation = TANH_GELU.get(kind, activation) if model.activation == "gelu_tanh" else activation
    config: dict[str, Any] = {"architectures": [CLASSES[kind]], "model_type": kind, **token_ids}
    config |= {"vocab_size": model.padded_vocab_size, "tie_word_embeddings": model.tie_embeddings}
    config |= {"initializer_range": model.init_std, "use_cache": True}
    if kind == "gpt2":
        return config | {
            "n_layer": model.num_layers,
            "n_embd": model.hidden_size,
            "n_head": model.num_heads,
            "n_inner": model.mlp_width,
            "n_positions": longest,
            "n_ctx": longest,  # what it was called at first, which some programs still read
            "activation_function": activation,
            "layer_norm_epsilon": model.norm_eps,
            "embd_pdrop": model.embedding_dropout,
            "resid_pdrop": model.hidden_dropout,
            "attn_pdrop": model.attention_dropout,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
        }
    config |= {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_width,
        "max_position_embeddings": longest,
        "hidden_act": activation,
        "attention_bias": model.attention_bias,
        "attention_dropout": model.attention_dropout,
        **_rope(model),
    }
    if kind == "gpt_neox":
        return config | {
            "rotary_pct": model.rotary_pct,
            "rotary_emb_base": model.rotary_base,
            "layer_norm_eps": model.norm_eps,
            "use_parallel_residual": model.parallel_residual,
            "hidden_dropout": model.hidden_dropout,
        }
    config |= {
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "rms_norm_eps": model.norm_eps,
        "mlp_bias": model.mlp_bias,
    }
    if kind == "mistral":  # theirs counts the token itself
        config["sliding_window"] = None if model.sliding_window is None else model.sliding_window + 1
    return config


def _rope(model: ModelConfig) -> dict[str, Any]:
    """Both spellings: flat keys with `rope_scaling`, and the `rope_parameters` of recent versions."""
    flat = {"rope_theta": model.rotary_base, "partial_rotary_factor": model.rotary_pct}
    scaling = _rope_scaling(model.rope_scaling) if model.rope_scaling else None
    return {
        **flat,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **flat, **(scaling or {})},
    }


def _rope_scaling(scaling: RopeScaling) -> dict[str, Any]:
    keys = {
        "linear": (),
        "yarn": ("beta_fast", "beta_slow", "attention_factor"),
        "llama3": ("low_freq_factor", "high_freq_factor"),
    }[scaling.kind]
    values = {key: getattr(scaling, key) for key in keys if getattr(scaling, key) is not None}
    if scaling.original_positions and scaling.kind != "linear":
        values["original_max_position_embeddings"] = scaling.original_positions
    former = {"type": "linear"} if scaling.kind == "linear" else {}  # the key before there were other kinds
    return {"rope_type": scaling.kind, **former, "factor": scaling.factor, **values}


def _longest(checkpoint: Checkpoint, model: ModelConfig) -> int:
    return model.max_positions or (checkpoint.config.data.seq_length if checkpoint.config else 2048)


def _named(ours: Mapping[str, TensorRef], family: Family, model: ModelConfig, role: Role) -> dict[str, TensorRef]:
    theirs = to_theirs(table(family, model), ours, role)
    return {name if name == family.head else family.prefix + name: refs[0] for name, refs in theirs.items()}


def _safetensors(stem: str, tensors: Mapping[str, TensorRef], options: WriteOptions) -> list[OutputFile]:
    """One file, or shards and their index."""
    files = named_groups(stem, shards(tensors, options.shard_bytes))
    outputs = [tensors_output(file, group) for file, group in files.items()]
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(ref.num_bytes for ref in tensors.values())},
            "weight_map": {name: file for file, group in files.items() for name in group},
        }
        outputs.append(json_output(f"{stem}.safetensors.index.json", index))
    return outputs


def _optimizer(checkpoint: Checkpoint, family: Family, model: ModelConfig, options: WriteOptions) -> list[OutputFile]:
    """Moments, and masters unless they are the weights themselves."""
    state = checkpoint.optimizer
    if state is None:
        return []
    apart = any(each["master"] != checkpoint.model[name] for name, each in state.items())
    tensors: dict[str, TensorRef] = {}
    for role in ROLES if apart else ROLES[1:]:
        ours = {name: each[role] for name, each in state.items()}  # type: ignore[literal-required, typeddict-item]
        tensors |= {f"{name}.{role}": ref for name, ref in _named(ours, family, model, role).items()}
    return _safetensors("optimizer", tensors, options)


def _beside(checkpoint: Checkpoint) -> dict[str, Any]:
    state = checkpoint.optimizer
    return {
        "progress": asdict(checkpoint.progress),
        "optimizer_steps": None if state is None else {name: each["step"] for name, each in state.items()},
        **checkpoint.inherited,
        "config": checkpoint.config.model_dump(mode="json") if checkpoint.config else None,
    }
