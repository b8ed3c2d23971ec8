"""Hugging Face's config.json: our settings read from it and written to it, by the keys of its `Family`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from castalia.checkpoint.formats.huggingface.mixtures import MIXTRAL, written_mixtral
from castalia.checkpoint.formats.huggingface.names import ACTIVATIONS, FAMILIES, Family
from castalia.config.schema import MambaConfig, ModelConfig, RopeScaling
from castalia.errors import CheckpointError
from castalia.reading import keys, read_json

COUNTS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "sliding_window", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "head_dim",
    "state_size", "conv_kernel", "num_local_experts", "num_experts_per_tok",
)  # fmt: skip
SHARES = (
    "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "rope_theta", "rotary_emb_base", "rotary_pct", "embd_pdrop",
    "partial_rotary_factor", "attention_dropout", "hidden_dropout", "resid_pdrop", "attn_pdrop", "expand",
    "router_jitter_noise",
)  # fmt: skip
FLAGS = (
    "use_conv_bias",
    "use_bias",
    "residual_in_fp32",
    "use_parallel_residual",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
)
WORDS = ("model_type", "hidden_act", "activation_function", "dtype", "torch_dtype")
TABLES = ("rope_parameters", "rope_scaling", "quantization_config")
Count = Annotated[int, Field(gt=0, lt=1 << 40)]
GIVEN = keys(  # of config.json
    {
        "architectures": list | None,
        **dict.fromkeys(COUNTS, Count | None),
        **dict.fromkeys(SHARES, float | None),
        **dict.fromkeys(FLAGS, bool | None),
        **dict.fromkeys(WORDS, str | None),
        **dict.fromkeys(TABLES, dict[str, Any] | None),
    }
)


class ConfigJson:
    """config.json as its class reads it, with the defaults of its model type. Errors name the file."""

    def __init__(self, path: Path, given: Mapping[str, Any], family: Family) -> None:
        self.path, self.family = path, family
        self.given = {key: value for key, value in given.items() if key not in family.foreign}
        self.values = {**family.defaults, **self.given}
        ignored = [f"{key}={given[key]}" for key in family.foreign if given.get(key)]
        kind = given.get("model_type")
        self.notes = (
            [f"{', '.join(ignored)} of config.json means nothing in a {kind} model: it is ignored"] if ignored else []
        )

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key)

    def refuse(self, reason: str) -> CheckpointError:
        """An error that names the file."""
        return CheckpointError(f"{self.path}: {reason}")

    def require(self, key: str, *allowed: object) -> None:
        """Raises CheckpointError unless a key has one of the values that our model can compute."""
        if self[key] not in allowed:
            raise self.refuse(f"{key}={self[key]!r} is not supported; only {' or '.join(map(repr, allowed))}")


def read_config(path: Path) -> ConfigJson:
    """Read the file. Raises CheckpointError for other JSON, unknown model types, and quantized weights."""
    given: dict[str, Any] = read_json(path, CheckpointError, GIVEN)
    architectures = given.get("architectures") or []
    kind = given.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        name = f"model_type {kind!r}" + (f" ({', '.join(map(str, architectures))})" if architectures else "")
        raise CheckpointError(f"{path}: {name} is not supported; supported are {', '.join(FAMILIES)}")
    config = ConfigJson(path, given, family)
    if config["quantization_config"]:
        method = config["quantization_config"].get("quant_method")
        raise config.refuse(f"the weights are quantized ({method}), which is not supported; use the original weights")
    return config


def model_of(config: ConfigJson) -> ModelConfig:
    """The model that the class builds. Raises CheckpointError for values that our model cannot compute."""
    vocabulary = {"vocab_size": config["vocab_size"], "vocab_multiple": 1}
    try:
        return ModelConfig(**settings(config), **vocabulary, tie_embeddings=config["tie_word_embeddings"])
    except (ValueError, TypeError) as error:  # pydantic's ValidationError is a ValueError
        raise config.refuse(f"not a usable config: {error}") from error


def settings(config: ConfigJson) -> dict[str, Any]:
    """The settings of `ModelConfig` that the file, or its model type, fixes."""
    family = config.family
    values: dict[str, Any] = {}
    for key in family.refused:
        config.require(key, False)
    for key, names in family.keys.items():
        if isinstance(names, bool):
            config.require(key, names)
            continue
        for name in names.split():
            if name not in values:  # otherwise this key is another spelling
                values[name] = READERS.get(name, _as_it_is)(config, key)
    return {**family.fixed, **{name: value for name, value in values.items() if name in ModelConfig.model_fields}}


def _as_it_is(config: ConfigJson, key: str) -> Any:
    return config[key]


def _flag(config: ConfigJson, key: str) -> bool:
    return bool(config[key])


def _activation(config: ConfigJson, key: str) -> str:
    if config[key] not in ACTIVATIONS:
        raise config.refuse(f"{key}={config[key]!r} is not supported; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[config[key]]


def _head_size(config: ConfigJson, key: str) -> Any:
    """The class's heads may have any size; ours share the hidden size."""
    config.require(key, None, config["hidden_size"] // config["num_attention_heads"])
    return config[key]


def _window(config: ConfigJson, key: str) -> int | None:
    """Hugging Face's window counts the token itself, ours only the tokens before it."""
    if config[key] == 1:
        raise config.refuse("sliding_window=1 is not supported: tokens would see only themselves")
    return None if config[key] is None else config[key] - 1


def _rope(config: ConfigJson) -> Mapping[str, Any]:
    """The table of rotary settings. Before there was `rope_parameters`, there were flat keys and `rope_scaling`."""
    return config.given.get("rope_parameters") or config.given.get("rope_scaling") or {}


def _rotary_base(config: ConfigJson, key: str) -> float:
    return _either(config, _rope(config), key, "rotary_emb_base")


def _rotary_share(config: ConfigJson, key: str) -> float:
    share = _either(config, _rope(config), key, "rotary_pct")
    if share not in config.family.holds.get("rotary_pct", {share}):
        raise config.refuse(f"partial_rotary_factor={share} means nothing in a {config['model_type']} model")
    return share


def _either(config: ConfigJson, nested: Mapping[str, Any], key: str, old_key: str) -> float:
    """A value that may be in the nested table or in either of two flat keys.

    The nested one counts. Raises CheckpointError for flat ones that contradict each other.
    """
    flat = {name: config.given[name] for name in (key, old_key) if config.given.get(name) is not None}
    if nested.get(key) is not None:
        return nested[key]
    if len(set(flat.values())) > 1:
        raise config.refuse(f"{' and '.join(f'{name}={value}' for name, value in flat.items())} contradict each other")
    return next(iter(flat.values()), config[key])


def _rope_scaling(config: ConfigJson, key: str) -> RopeScaling | None:
    nested = _rope(config)
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "yarn", "llama3"):
        raise config.refuse(f"rotary scaling {kind!r} is not supported; known are linear, yarn and llama3")
    for key in ("mscale", "mscale_all_dim"):
        if nested.get(key) is not None:
            raise config.refuse(f"{key} of the rotary scaling is not supported")
    if nested.get("truncate") is False:
        raise config.refuse("truncate=false of the rotary scaling is not supported")
    names = ("factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", "attention_factor")
    values = {name: nested[name] for name in names if nested.get(name) is not None}
    original = nested.get("original_max_position_embeddings") or config["max_position_embeddings"]
    return RopeScaling(kind=kind, original_positions=original, **values)


def _mamba(config: ConfigJson, key: str) -> dict[str, Any] | None:
    """The sizes of Mamba blocks; None for those that ours have without being told."""
    config.require("hidden_act", "silu")
    hidden, rank = config["hidden_size"], config["time_step_rank"]
    width = int(config["expand"] * hidden)
    sizes = MambaConfig(
        width=None if width == 2 * hidden else width,
        states=config["state_size"],
        taps=config["conv_kernel"],
        rank=None if rank in ("auto", -(-hidden // 16)) else rank,
        conv_bias=config["use_conv_bias"],
    )
    return None if sizes == MambaConfig() else sizes.model_dump()


def _written_mamba(model: ModelConfig) -> dict[str, Any]:
    sizes = model.mamba_sizes
    return {
        "state_size": sizes.states, "conv_kernel": sizes.taps, "expand": model.mamba_width // model.hidden_size,
        "time_step_rank": model.mamba_rank, "use_conv_bias": sizes.conv_bias, "hidden_act": "silu",
        "residual_in_fp32": False,
    }  # fmt: skip


def _experts(config: ConfigJson, key: str) -> dict[str, Any]:
    """The experts of Mixtral's blocks."""
    config.require("router_jitter_noise", 0.0)
    sizes = {"count": "num_local_experts", "top_k": "num_experts_per_tok", "width": "intermediate_size"}
    return MIXTRAL | {ours: config[theirs] for ours, theirs in sizes.items()}


READERS: dict[str, Callable[[ConfigJson, str], Any]] = {  # settings that are not simply the value of their key
    "activation": _activation, "attention_bias": _flag, "mlp_bias": _flag, "head_size": _head_size,
    "sliding_window": _window, "rotary_base": _rotary_base, "rotary_pct": _rotary_share, "rope_scaling": _rope_scaling,
    "mamba": _mamba, "experts": _experts,
}  # fmt: skip


def spelled_out(model: ModelConfig, longest: int) -> ModelConfig:
    """The model with the values that None stands for. `longest`: the longest sequence, in tokens."""
    explicit = {"mlp_size": model.mlp_width, "num_kv_heads": model.kv_heads, "max_positions": longest}
    return model.with_(explicit)


def to_config_json(kind: str, model: ModelConfig, longest: int, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json. Defaults are written too, since versions of transformers differ in them."""
    family, model = FAMILIES[kind], spelled_out(model, longest)
    name = family.reward_class if model.reward_head else family.class_name
    config: dict[str, Any] = {"architectures": [name], "model_type": kind, **token_ids}
    if model.reward_head:  # one number, of which the class knows by the number of its labels
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    config |= {"vocab_size": model.padded_vocab_size, "tie_word_embeddings": model.tie_embeddings}
    config |= {"initializer_range": model.init_std, "use_cache": True}
    for key, names in family.keys.items():
        config[key] = names if isinstance(names, bool) else getattr(model, names.split()[0])
        if names == "activation":
            written = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())} | {"gelu_tanh": family.gelu_tanh}
            config[key] = written[model.activation]
        elif names == "mamba":
            config[key] = _written_mamba(model)[key]
        elif names == "experts":
            config[key] = written_mixtral(model)[key]
        elif names == "sliding_window" and model.sliding_window is not None:
            config[key] += 1  # Hugging Face counts the token itself
        elif names == "rope_scaling":
            config[key] = _written_rope(model, nested=key == "rope_parameters")
    return config


def _written_rope(model: ModelConfig, nested: bool) -> dict[str, Any] | None:
    """The value of `rope_scaling`, or of `rope_parameters`, in which the flat keys are `nested`."""
    scaling = _written_scaling(model.rope_scaling) if model.rope_scaling else None
    flat = {"rope_theta": model.rotary_base, "partial_rotary_factor": model.rotary_pct}
    return {"rope_type": "default", **flat, **(scaling or {})} if nested else scaling


def _written_scaling(scaling: RopeScaling) -> dict[str, Any]:
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
