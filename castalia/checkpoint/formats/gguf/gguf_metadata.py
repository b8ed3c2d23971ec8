"""The metadata of a model in a GGUF file: our settings written to it and read from it."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from castalia.checkpoint.formats.gguf.dense_architectures import gemma2_scale, no_rope_pattern
from castalia.checkpoint.formats.gguf.names import ARCHITECTURES, HEAD, LLAMA3_FACTORS, not_computed
from castalia.checkpoint.formats.huggingface.config_json import share_of
from castalia.config.schema import ModelConfig, RopeScaling, shortest
from castalia.errors import CheckpointError
from castalia.strict_json import to_json

# The parameters of Llama 3's rotary scaling, which the file has only as factors. Others pass this key over.
LLAMA3_KEY = "castalia.rope_scaling"
KEYS = {  # behind the name of the architecture -> our setting
    "context_length": "max_positions", "embedding_length": "hidden_size", "block_count": "num_layers",
    "feed_forward_length": "mlp_size", "attention.head_count": "num_heads", "attention.head_count_kv": "num_kv_heads",
    "vocab_size": "vocab_size",
}  # fmt: skip
ROTARY_KEYS = {
    "rope.dimension_count": int, "rope.freq_base": float, "rope.scale_linear": float, "rope.scaling.type": str,
    "rope.scaling.factor": float, "rope.scaling.original_context_length": int, "rope.scaling.attn_factor": float,
}  # fmt: skip
HEAD_KEYS = ("attention.key_length", "attention.value_length")  # of architectures with a free size of heads
MORE_KEYS = {  # of single architectures -> our setting
    "olmo": {"attention.clamp_kqv": "clip_qkv"},
    "gemma2": {"attn_logit_softcapping": "attention_softcap", "final_logit_softcapping": "logit_softcap"},
}
WINDOW_KEY = "attention.sliding_window"  # of gemma2; it counts the token itself, ours only the tokens before it
WITH_PARALLEL = ("gptneox", "stablelm")  # architectures that say it
# Keys that are not read -> their values that leave the model as it is. Of all keys of experts it is 0.
IDLE: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,), "attention.clamp_kqv": (0,), "attention.max_alibi_bias": (0,),
    "attention.scale": (0,), "attention.sliding_window": (0,), "embedding_scale": (0, 1), "logit_scale": (0, 1),
    "pooling_type": (0,), "residual_scale": (0, 1), "rope.scaling.finetuned": (False, True),
    "rope.scaling.yarn_attn_factor": (1,), "rope.scaling.yarn_beta_fast": (32,),
    "rope.scaling.yarn_beta_slow": (1,), "tensor_data_layout": ("reference", "Meta AI original pth"),
    "use_parallel_residual": (False,),
}  # fmt: skip
TYPES = {int: "a whole number", float: "a finite number in fp32", str: "a text", bool: "a truth value"}
LARGEST = float(np.finfo(np.float32).max)


def to_metadata(name: str, model: ModelConfig, longest: int, rows: int) -> dict[str, Any]:
    """The model's part of the metadata. `longest`: the longest sequence, in tokens; `rows`: of the embedding."""
    explicit = {"max_positions": longest, "mlp_size": model.mlp_width, "num_kv_heads": model.kv_heads}
    values = {**model.model_dump(), **explicit, "vocab_size": rows}
    result: dict[str, Any] = {key: values[ours] for key, ours in KEYS.items()}
    result[_epsilon(model.norm)] = model.norm_eps
    if name in WITH_PARALLEL:
        result["use_parallel_residual"] = model.parallel_residual
    if "head_dim" in ARCHITECTURES[name].holds:
        result |= dict.fromkeys(HEAD_KEYS, model.head_size)
    more_keys = MORE_KEYS.get(name, {})
    result |= {key: values[ours] for key, ours in more_keys.items() if values[ours] is not None}
    if name == "gemma2":  # it has one in any case
        result[WINDOW_KEY] = longest if model.window is None else model.window + 1
    if model.position == "rotary":
        result |= {"rope.dimension_count": model.rotary_size, "rope.freq_base": model.rotary_base}
    more: dict[str, Any] = {}
    if scaling := model.rope_scaling:
        if scaling.kind == "llama3":
            more = {LLAMA3_KEY: to_json(scaling.model_dump())}
        else:
            result |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
        if scaling.kind == "yarn":
            result["rope.scaling.original_context_length"] = scaling.original_positions or longest
            if scaling.attention_factor is not None:  # it multiplies what llama.cpp computes by itself
                result["rope.scaling.attn_factor"] = scaling.attention_factor / _magnitude(scaling.factor)
    return {f"{name}.{key}": value for key, value in result.items()} | more


def _epsilon(norm: str) -> str:
    return "attention.layer_norm_rms_epsilon" if norm == "rmsnorm" else "attention.layer_norm_epsilon"


def _magnitude(factor: float) -> float:
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def from_metadata(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: str) -> ModelConfig:
    """The model that a file describes. `shapes`: of its tensors, which show biases and the head.

    Raises CheckpointError for architectures and settings that are not ours, and for values that are missing or of
    another type.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: general.architecture {reprlib.repr(name)} is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    if not shapes.get("token_embd.weight"):
        raise CheckpointError(f"{path}: token_embd.weight is missing, or has no dimensions")
    architecture = ARCHITECTURES[name]
    fixed, epsilon = architecture.fixed, _epsilon(architecture.fixed["norm"])
    given = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    optional = {"attention.head_count_kv": None, "vocab_size": shapes["token_embd.weight"][0]}
    if missing := sorted({*KEYS, epsilon} - optional.keys() - given.keys()):
        raise CheckpointError(f"{path}: {name}.{missing[0]} is missing")
    types = {**dict.fromkeys(KEYS, int), epsilon: float}
    types |= {"use_parallel_residual": bool} if name in WITH_PARALLEL else {}
    types |= dict.fromkeys(MORE_KEYS.get(name, {}), float) | ({WINDOW_KEY: int} if name == "gemma2" else {})
    types |= dict.fromkeys(HEAD_KEYS, int) if "head_dim" in architecture.holds else {}
    types |= ROTARY_KEYS if fixed["position"] == "rotary" else {}
    for key, value in given.items():
        if key in types and not _is(value, types[key]):
            raise CheckpointError(f"{path}: {name}.{key} is {reprlib.repr(value)}, which is not {TYPES[types[key]]}")
    values: dict[str, Any] = {ours: given.get(key, optional.get(key)) for key, ours in KEYS.items()}
    width, heads = values["hidden_size"], values["num_heads"]
    free = "head_dim" in architecture.holds and given.get(HEAD_KEYS[0], 0) > 0
    if width <= 0 or heads <= 0 or (width % heads and not free):
        raise CheckpointError(f"{path}: {name}.embedding_length={width} is no multiple of attention.head_count={heads}")
    size = given[HEAD_KEYS[0]] if free else width // heads
    idle = {**IDLE, "attention.key_length": (size,), "attention.value_length": (size,)}
    for key in sorted(given.keys() - types.keys()):
        if given[key] not in idle.get(key, (0,) if key.startswith("expert_") else ()):
            raise CheckpointError(f"{path}: {name}.{key}={reprlib.repr(given[key])} is not supported")
    if given.get(HEAD_KEYS[1], size) != size:
        raise CheckpointError(f"{path}: {name}.{HEAD_KEYS[1]} is not {HEAD_KEYS[0]}={size}, which is not supported")
    values["norm_eps"] = _shortest(given[epsilon])
    values |= {"vocab_multiple": 1, "tie_embeddings": HEAD not in shapes, **fixed}
    biased = {"attention_bias": ("attn_qkv", "attn_q"), "mlp_bias": ("ffn_up",)}
    values |= {key: any(f"blk.0.{word}.bias" in shapes for word in words) for key, words in biased.items()}
    values |= _of_one_architecture(name, given, shapes, values, size)
    try:
        if name == "gptneox":
            values["parallel_residual"] = given.get("use_parallel_residual", True)
        if fixed["position"] == "rotary":
            values["rotary_pct"] = share_of(given.get("rope.dimension_count", size), size)
            values["rotary_base"] = _shortest(given.get("rope.freq_base", 10000.0))
            values["rope_scaling"] = _scaling(given, metadata, LLAMA3_FACTORS in shapes)
        model = ModelConfig(**values)
    except ValueError as error:  # pydantic's ValidationError is a ValueError
        raise CheckpointError(f"{path}: not a usable model: {error}") from error
    if reasons := not_computed(model, architecture):
        raise CheckpointError(f"{path}: not a model that {name} computes: {'; '.join(reasons)}")
    return model


def _of_one_architecture(
    name: str,
    given: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    values: Mapping[str, Any],
    size: int,
) -> dict[str, Any]:
    """The settings that not all architectures have."""
    found: dict[str, Any] = {ours: given.get(key) for key, ours in MORE_KEYS.get(name, {}).items()}
    found = {ours: None if value is None else _shortest(value) for ours, value in found.items()}
    if "head_dim" in ARCHITECTURES[name].holds and size * values["num_heads"] != values["hidden_size"]:
        found["head_dim"] = size
    if ARCHITECTURES[name].scales_embedding:
        found["embedding_multiplier"] = values["hidden_size"] ** 0.5
    if name == "gemma2":  # with the values that llama.cpp takes where the file has none
        found |= {"attention_softcap": found["attention_softcap"] or 50.0}
        found |= {"logit_softcap": found["logit_softcap"] or 30.0, "attention_scale": gemma2_scale(values, size)}
        found |= {"sliding_window": given.get(WINDOW_KEY, 4096) - 1, "window_pattern": (True, False)}
    if name == "smollm3":
        found["rotary_pattern"] = shortest(no_rope_pattern(min(values["num_layers"], 4)))
    if name == "stablelm":  # as llama.cpp does, by the tensors, whatever the key says
        found["qk_norm"] = "each_head" if "blk.0.attn_q_norm.weight" in shapes else False
        found["parallel_residual"] = "blk.0.ffn_norm.weight" not in shapes
        found["attention_out_bias"] = False
    return found


def _is(value: Any, kind: type) -> bool:
    """Whether a value of the metadata has the type of its key. Whole numbers are also floats."""
    if kind is float:
        return type(value) in (int, float) and abs(value) <= LARGEST
    return type(value) is kind


def _shortest(value: float) -> float:
    """The shortest decimal number that is this fp32 value: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _scaling(given: Mapping[str, Any], metadata: Mapping[str, Any], factors: bool) -> RopeScaling | None:
    kind = given.get("rope.scaling.type", "linear")  # as llama.cpp takes it
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"rope.scaling.type {reprlib.repr(kind)} is not supported; known are linear and yarn")
    factor = given.get("rope.scaling.factor", given.get("rope.scale_linear"))
    if factor is None and kind != "none" and "rope.scaling.type" in given:
        raise ValueError(f"rope.scaling.type is {kind!r}, but rope.scaling.factor is missing")
    if not factor:
        kind = "none"
    if kind != "yarn" and given.get("rope.scaling.attn_factor", 1) != 1:
        raise ValueError("rope.scaling.attn_factor is supported for yarn alone")
    if factors:
        if kind != "none":
            raise ValueError(f"{LLAMA3_FACTORS} together with rope.scaling.factor is not supported")
        if LLAMA3_KEY not in metadata:
            raise ValueError(f"{LLAMA3_FACTORS} does not show the rotary scaling that it was computed from")
        return RopeScaling.model_validate_json(metadata[LLAMA3_KEY])
    if kind == "none":
        return None
    factor = _shortest(factor)
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    share = given.get("rope.scaling.attn_factor")
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_positions=given.get("rope.scaling.original_context_length"),
        attention_factor=None if share is None else _shortest(share * _magnitude(factor)),
    )
