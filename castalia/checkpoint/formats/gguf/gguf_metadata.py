"""The metadata of a model in a GGUF file: our settings written to it and read from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from castalia.checkpoint.formats.gguf.names import ARCHITECTURES, HEAD, LLAMA3_FACTORS
from castalia.config.schema import ModelConfig, RopeScaling
from castalia.errors import CheckpointError
from castalia.strict_json import to_json

# The parameters of Llama 3's rotary scaling, which the file has only as factors. Others pass this key over.
LLAMA3_KEY = "castalia.rope_scaling"
KEYS = {  # behind the name of the architecture -> our setting
    "context_length": "max_positions", "embedding_length": "hidden_size", "block_count": "num_layers",
    "feed_forward_length": "mlp_size", "attention.head_count": "num_heads", "attention.head_count_kv": "num_kv_heads",
    "vocab_size": "vocab_size",
}  # fmt: skip


def to_metadata(name: str, model: ModelConfig, longest: int, rows: int) -> dict[str, Any]:
    """The model's part of the metadata. `longest`: the longest sequence, in tokens; `rows`: of the embedding."""
    explicit = {"max_positions": longest, "mlp_size": model.mlp_width, "num_kv_heads": model.kv_heads}
    values = {**model.model_dump(), **explicit, "vocab_size": rows}
    result: dict[str, Any] = {key: values[ours] for key, ours in KEYS.items()}
    result[_epsilon(model.norm)] = model.norm_eps
    if name == "gptneox":
        result["use_parallel_residual"] = model.parallel_residual
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

    Raises CheckpointError for architectures and settings that are not ours, and for values that are missing.
    """
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: general.architecture {name!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[name]
    given = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    optional = {"attention.head_count_kv": None, "vocab_size": shapes.get("token_embd.weight", (None,))[0]}
    needed = {*KEYS, _epsilon(architecture.fixed["norm"])} - optional.keys()
    if missing := sorted(key for key in needed if key not in given):
        raise CheckpointError(f"{path}: {name}.{missing[0]} is missing")
    if unknown := sorted(
        key for key in given if key.startswith(("expert_", "attention.sliding_window")) and given[key]
    ):
        raise CheckpointError(f"{path}: {name}.{unknown[0]}={given[unknown[0]]} is not supported")
    values: dict[str, Any] = {ours: given.get(key, optional.get(key)) for key, ours in KEYS.items()}
    values["norm_eps"] = _shortest(given[_epsilon(architecture.fixed["norm"])])
    values |= {"vocab_multiple": 1, "tie_embeddings": HEAD not in shapes, **architecture.fixed}
    biased = {"attention_bias": ("attn_qkv", "attn_q"), "mlp_bias": ("ffn_up",)}
    values |= {key: any(f"blk.0.{word}.bias" in shapes for word in words) for key, words in biased.items()}
    try:
        if name == "gptneox":
            values["parallel_residual"] = given.get("use_parallel_residual", True)
        if architecture.fixed["position"] == "rotary":
            size = values["hidden_size"] // values["num_heads"]
            values["rotary_pct"] = _share(given.get("rope.dimension_count", size), size)
            values["rotary_base"] = _shortest(given.get("rope.freq_base", 10000.0))
            values["rope_scaling"] = _scaling(given, metadata, LLAMA3_FACTORS in shapes)
        return ModelConfig(**values)
    except (
        ValueError,
        TypeError,
        LookupError,
        ZeroDivisionError,
    ) as error:  # pydantic's ValidationError is a ValueError
        raise CheckpointError(f"{path}: not a usable model: {error}") from error


def _shortest(value: float) -> float:
    """The shortest decimal number that is this fp32 value: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _share(rotated: int, size: int) -> float:
    """The share of a head's dimensions whose product with `size` is `rotated` when it is rounded down."""
    share = rotated / size
    return share if int(size * share) == rotated else math.nextafter(share, 1.0)


def _scaling(given: Mapping[str, Any], metadata: Mapping[str, Any], factors: bool) -> RopeScaling | None:
    if factors:
        if LLAMA3_KEY not in metadata:
            raise ValueError(f"{LLAMA3_FACTORS} does not show the rotary scaling that it was computed from")
        return RopeScaling.model_validate_json(metadata[LLAMA3_KEY])
    kind = given.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = _shortest(given["rope.scaling.factor"])
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    if kind != "yarn":
        raise ValueError(f"rope.scaling.type {kind!r} is not supported; known are linear and yarn")
    share = given.get("rope.scaling.attn_factor")
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_positions=given.get("rope.scaling.original_context_length"),
        attention_factor=None if share is None else _shortest(share * _magnitude(factor)),
    )
