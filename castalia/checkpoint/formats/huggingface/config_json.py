"""Hugging Face's config.json: our settings read from it and written to it, by the keys of its `Family`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from castalia.checkpoint.formats.huggingface.block_patterns import READ_PATTERNS, WRITTEN_PATTERNS, windowed
from castalia.checkpoint.formats.huggingface.idle_keys import REFUSED, ROPE_KEYS
from castalia.checkpoint.formats.huggingface.mixtures import plain_experts
from castalia.checkpoint.formats.huggingface.model_type import ACTIVATIONS, Family
from castalia.checkpoint.formats.huggingface.names import FAMILIES, plain_values
from castalia.config.schema import MambaConfig, ModelConfig, RopeScaling
from castalia.errors import CheckpointError
from castalia.reading import keys, read_json, short

COUNTS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "head_dim",
    "state_size", "conv_kernel", "num_local_experts", "num_experts_per_tok", "num_layers", "num_heads", "window_size",
    "ffn_dim", "word_embed_proj_dim", "rotary_dim", "n_embed", "no_rope_layer_interval",
    "query_pre_attn_scalar", "num_experts", "moe_intermediate_size", "shared_expert_intermediate_size",
    "decoder_sparse_step", "n_routed_experts", "n_shared_experts", "n_group", "topk_group",
)  # fmt: skip
COUNTS_FROM_0 = ("max_window_layers", "sliding_window", "first_k_dense_replace", "num_nextn_predict_layers")
SHARES = (
    "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "rope_theta", "rotary_emb_base", "rotary_pct", "embd_pdrop",
    "partial_rotary_factor", "attention_dropout", "hidden_dropout", "resid_pdrop", "attn_pdrop", "expand",
    "clip_qkv", "resid_dropout", "embed_dropout", "dropout", "layerdrop", "router_jitter_noise",
    "attn_logit_softcapping", "final_logit_softcapping", "routed_scaling_factor",
)  # fmt: skip
FLAGS = (
    "use_conv_bias",
    "use_bias",
    "residual_in_fp32",
    "use_parallel_residual",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "use_sliding_window",
    "use_qkv_bias",
    "qk_layernorm",
    "qkv_bias",
    "norm_topk_prob",
    "use_qk_norm",
)
WORDS = ("model_type", "hidden_act", "hidden_activation", "activation_function", "dtype", "torch_dtype")
LISTS = ("layer_types", "no_rope_layers", "attention_types", "mlp_only_layers")
TABLES = ("rope_parameters", "rope_scaling", "quantization_config")
Count = Annotated[int, Field(gt=0, lt=1 << 40)]
Blocks = Annotated[int, Field(gt=0, le=10_000)]  # as many as a model may have: patterns are as long
GIVEN = keys(  # of config.json
    {
        "architectures": list | None,
        **dict.fromkeys(COUNTS, Count | None),
        **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer"), Blocks | None),
        **dict.fromkeys(SHARES, float | None),
        **dict.fromkeys(FLAGS, bool | None),
        **dict.fromkeys(WORDS, str | None),
        **dict.fromkeys(LISTS, list | None),
        **dict.fromkeys(TABLES, dict[str, Any] | None),
        **dict.fromkeys(COUNTS_FROM_0, Annotated[int, Field(ge=0, lt=1 << 40)] | None),
    }
)


class ConfigJson:
    """config.json as its class reads it, with the defaults of its model type. Errors name the file."""

    def __init__(self, path: Path, given: Mapping[str, Any], family: Family) -> None:
        self.path, self.family = path, family
        known = {key: value for key, value in given.items() if key in family.known}
        self.given = {family.aliases[key]: value for key, value in known.items() if key in family.aliases} | {
            key: value for key, value in known.items() if key not in family.aliases
        }
        self.values = {**family.defaults, **self.given}
        self.notes = self._unknown(given)

    def _unknown(self, given: Mapping[str, Any]) -> list[str]:
        """One line that names the keys without a meaning here, but those that are null, false or 0."""
        unknown = {key: value for key, value in given.items() if key not in self.family.known}
        for table in ("rope_parameters", "rope_scaling"):
            inner = self.given.get(table) or {}
            unknown |= {f"{table}.{key}": value for key, value in inner.items() if key not in ROPE_KEYS}
        named = [f"{short(key)[1:-1]}={short(value)}" for key, value in unknown.items() if value not in (None, False)]
        if not named:
            return []
        them = "it is" if len(named) == 1 else "they are"
        return [
            f"{', '.join(named)} of config.json means nothing that we know of in a {given.get('model_type')} model: "
            f"{them} ignored"
        ]

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
    if config["vocab_size"] is None:
        raise config.refuse("vocab_size is null, which leaves the size of the embedding open")
    vocabulary = {"vocab_size": config["vocab_size"], "vocab_multiple": 1}
    try:
        return ModelConfig(**settings(config), **vocabulary, tie_embeddings=config["tie_word_embeddings"])
    except (ValueError, TypeError) as error:  # pydantic's ValidationError is a ValueError
        raise config.refuse(f"not a usable config: {error}") from error


def settings(config: ConfigJson) -> dict[str, Any]:
    """The settings of `ModelConfig` that the file, or its model type, fixes."""
    family = config.family
    values: dict[str, Any] = {"embedding_multiplier": config["hidden_size"] ** 0.5} if family.scales_embedding else {}
    for key in (*REFUSED, *family.refused):
        config.require(key, False, None, *([{}] if key == "pruned_heads" else []))
    config.require("is_causal", True, None)
    if "head_dim" in family.beside:  # a class that reads it but has no such setting
        config.require("head_dim", None, config["hidden_size"] // config["num_attention_heads"])
    for key, names in family.keys.items():
        if not isinstance(names, str):
            config.require(key, names)
            continue
        for name in names.split():
            if name not in values:  # otherwise this key is another spelling
                read = _word if key in family.words else READERS.get(name, _as_it_is)
                values[name] = read(config, key)
    values = {**family.fixed, **values}
    experts = {name.removeprefix("experts."): value for name, value in values.items() if name.startswith("experts.")}
    known = {name: value for name, value in values.items() if name in ModelConfig.model_fields}
    return known | ({"experts": experts} if experts else {})


def _as_it_is(config: ConfigJson, key: str) -> Any:
    return config[key]


def _word(config: ConfigJson, key: str) -> Any:
    """A value that the family has another word for."""
    words = config.family.words[key]
    if isinstance(config[key], str) and config[key] not in words:
        return READERS["activation"](config, key)
    config.require(key, *words)
    return words[config[key]]


def _flag(config: ConfigJson, key: str) -> bool:
    return bool(config[key])


def _activation(config: ConfigJson, key: str) -> str:
    if config[key] not in ACTIVATIONS:
        raise config.refuse(f"{key}={config[key]!r} is not supported; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[config[key]]


def _head_dim(config: ConfigJson, key: str) -> int | None:
    """None where heads share the hidden size, as where nothing is said."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    return None if not heads or config[key] == hidden / heads else config[key]


def _same_width(config: ConfigJson, key: str) -> int:
    """The width of embeddings, which is that of the hidden state."""
    config.require(key, None, config["hidden_size"])
    return config["hidden_size"]


def _window(config: ConfigJson, key: str) -> int | None:
    """Hugging Face's window counts the token itself, ours only the tokens before it."""
    if not any(windowed(config)):
        return None
    if config[key] in (0, 1):
        raise config.refuse(f"{key}={config[key]} is not supported: tokens would see none before them")
    return None if config[key] is None else config[key] - 1


def _rope(config: ConfigJson) -> Mapping[str, Any]:
    """The table of rotary settings. Before there was `rope_parameters`, there were flat keys and `rope_scaling`."""
    return config.given.get("rope_parameters") or config.given.get("rope_scaling") or {}


def _rotary_base(config: ConfigJson, key: str) -> float:
    return _either(config, _rope(config), key, "rotary_emb_base")


def _rotary_share(config: ConfigJson, key: str) -> float:
    if key == "rotary_dim":  # GPT-J's number of dimensions
        config.require(key, *range(2, (size := config["n_embd"] // config["n_head"]) + 1, 2))
        return share_of(config[key], size)
    share = _either(config, _rope(config), key, "rotary_pct")
    allowed = config.family.holds.get("rotary_pct")
    if allowed is not None and share not in allowed:
        raise config.refuse(f"partial_rotary_factor={share} means nothing in a {config['model_type']} model")
    return share


def share_of(rotated: int, size: int) -> float:
    """The share of a head's dimensions whose product with `size` is `rotated` when it is rounded down."""
    share = rotated / size
    return share if int(size * share) == rotated else math.nextafter(share, 1.0)


def _attention_scale(config: ConfigJson, key: str) -> float | None:
    """Gemma's number under the root; None where it is the head size."""
    return None if config[key] == config["head_dim"] else config[key] ** -0.5


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


def _chosen(config: ConfigJson, key: str) -> int:
    """Experts of a token."""
    of = next(key for key, name in config.family.keys.items() if name == "experts.count")
    if config[key] > config[of]:
        raise config.refuse(f"{key}={config[key]} is more than {of}={config[of]}")
    return config[key]


def _shared_width(config: ConfigJson, key: str) -> int:
    """The width of the shared expert, or of GLM's, which are one of as many widths."""
    return config[key] * config["moe_intermediate_size"] if key == "n_shared_experts" else config[key]


READERS: dict[str, Callable[[ConfigJson, str], Any]] = {  # settings that are not simply the value of their key
    "activation": _activation, "attention_bias": _flag, "mlp_bias": _flag, "head_dim": _head_dim,
    "same_width": _same_width, "sliding_window": _window, "rotary_base": _rotary_base, "rotary_pct": _rotary_share,
    "attention_scale": _attention_scale, "rope_scaling": _rope_scaling, "mamba": _mamba,
    "experts.top_k": _chosen, "experts.shared_width": _shared_width, **READ_PATTERNS,
}  # fmt: skip


def spelled_out(model: ModelConfig, longest: int) -> ModelConfig:
    """The model with the values that None stands for. `longest`: the longest sequence, in tokens."""
    explicit = {"mlp_size": model.mlp_width, "num_kv_heads": model.kv_heads, "max_positions": longest}
    return model.with_(explicit | ({"experts": plain_experts(model)} if model.experts else {}))


def to_config_json(kind: str, model: ModelConfig, longest: int, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json. Defaults are written too, since versions of transformers differ in them."""
    family, model = FAMILIES[kind], spelled_out(model, longest)
    name = family.reward_class if model.reward_head else family.class_name
    config: dict[str, Any] = {"architectures": [name], "model_type": kind, **token_ids}
    if model.reward_head:  # one number, of which the class knows by the number of its labels
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    config |= {"vocab_size": model.padded_vocab_size, "tie_word_embeddings": model.tie_embeddings}
    config |= {"initializer_range": model.init_std, "use_cache": True}
    model = model.with_(plain_values(model))
    for key, names in family.keys.items():
        if not isinstance(names, str):
            config[key] = names
            continue
        name = names.split()[0]
        if key in family.words:
            config[key] = next(word for word, ours in family.words[key].items() if ours == getattr(model, name))
        elif name == "activation":
            written = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())} | {"gelu_tanh": family.gelu_tanh}
            config[key] = written[model.activation]
        else:
            config[key] = WRITERS[name](model, key) if name in WRITERS else attrgetter(name)(model)
    return config


WRITERS: dict[str, Callable[[ModelConfig, str], Any]] = {  # the other way round of `READERS`
    "mamba": lambda model, key: _written_mamba(model)[key],
    "experts.shared_width": lambda model, key: _written_shared(model, key),
    "further_blocks": lambda model, key: 0,
    "head_dim": lambda model, key: model.head_size,
    "sliding_window": lambda model, key: _written_window(model, key),
    "some_window": lambda model, key: _written_window(model, key) or 4096,  # Gemma 2 needs one though no block has it
    "same_width": lambda model, key: model.hidden_size,
    "rotary_pct": lambda model, key: model.rotary_size if key == "rotary_dim" else model.rotary_pct,
    "attention_scale": lambda model, key: (
        round(model.attention_scale**-2) if model.attention_scale else model.head_size
    ),
    "rope_scaling": lambda model, key: _written_rope(model, nested=key == "rope_parameters"),
    **WRITTEN_PATTERNS,
}


def _written_shared(model: ModelConfig, key: str) -> int:
    assert model.experts is not None and model.experts.shared_width is not None
    return model.experts.shared_width // (model.expert_width if key == "n_shared_experts" else 1)


def _written_window(model: ModelConfig, key: str) -> int | None:
    """Hugging Face counts the token itself. GPT-Neo has a number in any case."""
    if model.sliding_window is None:
        return 256 if key == "window_size" else None
    return model.sliding_window + 1


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
