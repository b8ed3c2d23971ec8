"""Hugging Face folders of GPT-NeoX, GPT-2, Llama and Mistral: config.json, weights in safetensors or `.bin` files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from castalia.checkpoint.architecture_check import unrounded
from castalia.checkpoint.neox_defects import take_inherited
from castalia.checkpoint.rules import (
    Chain,
    Interleave,
    Op,
    PermuteRows,
    Role,
    Rule,
    Same,
    Transpose,
    per_block,
    to_ours,
)
from castalia.checkpoint.sampled_values import fingerprint
from castalia.checkpoint.tensors import AdamState, Checkpoint, CheckpointFacts, Progress
from castalia.config.schema import DataConfig, ModelConfig, RopeScaling, RunConfig, TokenizerConfig
from castalia.errors import CheckpointError
from castalia.reading import keys, read_json, short, typed
from castalia.storage.extent import FileTensor
from castalia.storage.lazy import TensorRef
from castalia.storage.safetensors import open_safetensors, safe_join
from castalia.storage.torch_file import open_pt

CONFIG = "config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # each may be an index of shards instead: + ".index.json"
OPTIMIZER_FILES = ("optimizer.safetensors",)
BESIDE = "castalia.json"  # a conversion's: optimizer steps, progress and the run's config
ROLES: tuple[Role, ...] = ("master", "exp_avg", "exp_avg_sq")
BLOCK = re.compile(r"(?:h|layers)\.(\d+)\.")
OLD_BUFFERS = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$|(^|\.)rotary_emb\.inv_freq$")
ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu", "mish": "mish",
    "sigmoid": "sigmoid", "linear": "identity",
}  # fmt: skip

COUNTS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "sliding_window", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "head_dim",
)  # fmt: skip
SHARES = (
    "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "rope_theta", "rotary_emb_base", "rotary_pct", "embd_pdrop",
    "partial_rotary_factor", "attention_dropout", "hidden_dropout", "resid_pdrop", "attn_pdrop",
)  # fmt: skip
FLAGS = ("use_parallel_residual", "attention_bias", "mlp_bias", "tie_word_embeddings")
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
NOTED = keys(  # of castalia.json
    {
        "progress": dict[str, Any] | None,
        "optimizer_steps": dict[str, int] | None,
        "fingerprint": str | None,
        "config": dict[str, Any] | None,
        "release": str | None,
        "summed_bias_ranks": Count,
        "summed_micro_batches": Count,
        "norm_ranks": Annotated[list[Count], Field(min_length=2, max_length=2)],
    }
)


@dataclass(frozen=True)
class Family:
    """One `model_type`: what its config means and where its tensors are."""

    prefix: str  # of the tensors of the model without its head
    head: str
    defaults: Mapping[str, Any]  # what a missing key of config.json means; it differs between the types
    architecture: Callable[[Config], dict[str, Any]]
    rules: Callable[[ModelConfig], list[Rule]]
    head_modules: tuple[str, ...] = ("lm_head",)  # as transformers calls it now, and as it did before
    foreign: tuple[str, ...] = ()  # keys of related types that this class does not read


class Config:
    """config.json as its class reads it: with the defaults of its type. Errors name the file."""

    def __init__(self, path: Path, given: Mapping[str, Any], family: Family) -> None:
        self.path, self.given = path, {key: value for key, value in given.items() if key not in family.foreign}
        self.values = {**family.defaults, **self.given}
        left = [f"{key}={given[key]}" for key in family.foreign if given.get(key)]
        kind = given.get("model_type")
        self.notes = (
            [f"{', '.join(left)} of config.json means nothing in a {kind} model: it is ignored"] if left else []
        )

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key)

    def refuse(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {reason}")

    def require(self, key: str, *allowed: object) -> None:
        """Raises CheckpointError when a key has a value that our model has no equal of."""
        if self[key] not in allowed:
            raise self.refuse(f"{key}={self[key]!r} is not supported; only {' or '.join(map(repr, allowed))}")

    def activation(self, key: str) -> str:
        if self[key] not in ACTIVATIONS:
            raise self.refuse(f"{key}={self[key]!r} is not supported; known are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[self[key]]


def _neox_architecture(config: Config) -> dict[str, Any]:
    return {
        **_common(config),
        **_rotary(config),
        "norm_eps": config["layer_norm_eps"],
        "activation": config.activation("hidden_act"),
        "parallel_residual": config["use_parallel_residual"],
        "attention_bias": config["attention_bias"],
        "embedding_dropout": config["hidden_dropout"],
        "hidden_dropout": config["hidden_dropout"],
    }


def _gpt2_architecture(config: Config) -> dict[str, Any]:
    config.require("scale_attn_weights", True)
    config.require("scale_attn_by_inverse_layer_idx", False)
    config.require("add_cross_attention", False)
    return {
        "num_layers": config["n_layer"],
        "hidden_size": config["n_embd"],
        "num_heads": config["n_head"],
        "mlp_size": config["n_inner"],
        "max_positions": config["n_positions"],
        "position": "learned",
        "norm_eps": config["layer_norm_epsilon"],
        "activation": config.activation("activation_function"),
        "embedding_dropout": config["embd_pdrop"],
        "hidden_dropout": config["resid_pdrop"],
        "attention_dropout": config["attn_pdrop"],
    }


def _llama_architecture(config: Config) -> dict[str, Any]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    config.require("head_dim", None, hidden // heads)
    rotary = _rotary(config)
    if rotary["rotary_pct"] != 1.0:
        raise config.refuse(
            f"partial_rotary_factor={rotary['rotary_pct']} means nothing in a {config['model_type']} model"
        )
    window = config["sliding_window"]  # tokens that are seen, the token itself included; ours counts those before it
    if window == 1:
        raise config.refuse("sliding_window=1 is not supported: tokens would see only themselves")
    return {
        **_common(config),
        **rotary,
        "num_kv_heads": config["num_key_value_heads"],
        "norm": "rmsnorm",
        "norm_eps": config["rms_norm_eps"],
        "activation": config.activation("hidden_act"),
        "gated_mlp": True,
        "attention_bias": bool(config["attention_bias"]),
        "mlp_bias": bool(config["mlp_bias"]),
        "sliding_window": None if window is None else window - 1,
    }


def _common(config: Config) -> dict[str, Any]:
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_heads": config["num_attention_heads"],
        "mlp_size": config["intermediate_size"],
        "max_positions": config["max_position_embeddings"],
        "attention_dropout": config["attention_dropout"],
    }


def _rotary(config: Config) -> dict[str, Any]:
    """Both spellings: `rope_parameters` holds everything; before it, flat keys and `rope_scaling`."""
    nested = config.given.get("rope_parameters") or config.given.get("rope_scaling") or {}
    return {
        "rotary_base": _either(config, nested, "rope_theta", "rotary_emb_base"),
        "rotary_pct": _either(config, nested, "partial_rotary_factor", "rotary_pct"),
        "rope_scaling": _rope_scaling(config, nested),
    }


def _either(config: Config, nested: Mapping[str, Any], key: str, old_key: str) -> float:
    """A value that has several places. The nested one counts; flat ones must not contradict each other."""
    flat = {name: config.given[name] for name in (key, old_key) if config.given.get(name) is not None}
    if nested.get(key) is not None:
        return nested[key]
    if len(set(flat.values())) > 1:
        raise config.refuse(f"{' and '.join(f'{name}={value}' for name, value in flat.items())} contradict each other")
    return next(iter(flat.values()), config[key])


def _rope_scaling(config: Config, nested: Mapping[str, Any]) -> RopeScaling | None:
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


def _with_bias(ours: str, theirs: str, op: Op | None = None, *, bias: bool = True) -> list[Rule]:
    """The rules of a module's weight and bias. Names of several modules are separated by spaces."""

    def each(names: str, kind: str) -> str:
        return " ".join(f"{name}.{kind}" for name in names.split())

    kinds = ("weight", "bias") if bias else ("weight",)
    return [Rule(each(ours, kind), each(theirs, kind), op or Same()) for kind in kinds]


def _neox_rules(model: ModelConfig) -> list[Rule]:
    theirs = "layers.{i}."
    block = [
        *_with_bias("blocks.{i}.norm1", theirs + "input_layernorm"),
        *_with_bias("blocks.{i}.norm2", theirs + "post_attention_layernorm"),
        *_with_bias("blocks.{i}.attn.qkv", theirs + "attention.query_key_value", bias=model.attention_bias),
        *_with_bias("blocks.{i}.attn.out", theirs + "attention.dense", bias=model.attention_bias),
        *_with_bias("blocks.{i}.mlp.up", theirs + "mlp.dense_h_to_4h"),
        *_with_bias("blocks.{i}.mlp.down", theirs + "mlp.dense_4h_to_h"),
    ]
    ends = [Rule("embed.weight", "embed_in.weight"), *_with_bias("norm", "final_layer_norm")]
    return ends + per_block(block, model.num_layers)


def _gpt2_rules(model: ModelConfig) -> list[Rule]:
    heads, size = model.num_heads, model.head_size
    by_head = PermuteRows((3, heads, size), (1, 0, 2))  # from all queries, all keys, all values
    theirs = "h.{i}."
    block = [
        *_with_bias("blocks.{i}.norm1", theirs + "ln_1"),
        *_with_bias("blocks.{i}.norm2", theirs + "ln_2"),
        Rule("blocks.{i}.attn.qkv.weight", theirs + "attn.c_attn.weight", Chain(Transpose(), by_head)),
        Rule("blocks.{i}.attn.qkv.bias", theirs + "attn.c_attn.bias", by_head),
        Rule("blocks.{i}.attn.out.weight", theirs + "attn.c_proj.weight", Transpose()),
        Rule("blocks.{i}.attn.out.bias", theirs + "attn.c_proj.bias"),
        Rule("blocks.{i}.mlp.up.weight", theirs + "mlp.c_fc.weight", Transpose()),
        Rule("blocks.{i}.mlp.up.bias", theirs + "mlp.c_fc.bias"),
        Rule("blocks.{i}.mlp.down.weight", theirs + "mlp.c_proj.weight", Transpose()),
        Rule("blocks.{i}.mlp.down.bias", theirs + "mlp.c_proj.bias"),
    ]
    ends = [Rule("embed.weight", "wte.weight"), Rule("positions.weight", "wpe.weight"), *_with_bias("norm", "ln_f")]
    return ends + per_block(block, model.num_layers)


def _llama_rules(model: ModelConfig) -> list[Rule]:
    size = model.head_size
    by_group = Interleave((model.num_heads // model.kv_heads * size, size, size), model.kv_heads)
    theirs, attention = "layers.{i}.", "layers.{i}.self_attn."
    projections = " ".join(attention + name for name in ("q_proj", "k_proj", "v_proj"))
    block = [
        Rule("blocks.{i}.norm1.weight", theirs + "input_layernorm.weight"),
        Rule("blocks.{i}.norm2.weight", theirs + "post_attention_layernorm.weight"),
        *_with_bias("blocks.{i}.attn.qkv", projections, by_group, bias=model.attention_bias),
        *_with_bias("blocks.{i}.attn.out", attention + "o_proj", bias=model.attention_bias),
        *_with_bias("blocks.{i}.mlp.gate", theirs + "mlp.gate_proj", bias=model.mlp_bias),
        *_with_bias("blocks.{i}.mlp.up", theirs + "mlp.up_proj", bias=model.mlp_bias),
        *_with_bias("blocks.{i}.mlp.down", theirs + "mlp.down_proj", bias=model.mlp_bias),
    ]
    ends = [Rule("embed.weight", "embed_tokens.weight"), Rule("norm.weight", "norm.weight")]
    return ends + per_block(block, model.num_layers)


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
FAMILIES = {
    "gpt_neox": Family(
        "gpt_neox.", "embed_out.weight", NEOX_DEFAULTS, _neox_architecture, _neox_rules, ("lm_head", "embed_out")
    ),
    "gpt2": Family("transformer.", "lm_head.weight", GPT2_DEFAULTS, _gpt2_architecture, _gpt2_rules),
    "llama": Family(
        "model.", "lm_head.weight", LLAMA_DEFAULTS, _llama_architecture, _llama_rules, foreign=("sliding_window",)
    ),
    "mistral": Family(
        "model.",
        "lm_head.weight",
        MISTRAL_DEFAULTS,
        _llama_architecture,
        _llama_rules,
        foreign=("attention_bias", "mlp_bias"),
    ),
}


def detect(path: Path) -> bool:
    return (path / CONFIG).is_file() and bool(read_table(path / CONFIG).keys() & {"model_type", "architectures"})


def has_weights(path: Path, names: Sequence[str] = WEIGHT_FILES) -> bool:
    return any((path / name).is_file() or (path / f"{name}.index.json").is_file() for name in names)


def read(path: Path, tokenizer: str | None = None) -> Checkpoint:
    """Open a folder. Only config.json and the headers of the weights' files are read, and a few values."""
    config, family = _read_config(path / CONFIG)
    tensors = _open_weights(path)
    named = _by_rank(tensors, family)
    model, tie_note = _tied_as_transformers_does(_model(config, family), family, named)
    _check_blocks(path, named, model.num_layers)
    beside, beside_note = _beside(path, tensors)
    ours = to_ours(table(family, model), named, ignore=OLD_BUFFERS.pattern)
    run = _run_config(path, config, family, model, beside, tokenizer)
    noted = typed(beside.get("progress") or {}, f"{path / BESIDE}: progress", CheckpointError, Progress)
    progress, inherited = take_inherited(noted, beside, run)
    return Checkpoint(
        str(path),
        "huggingface",
        ours,
        _optimizer(path, beside, family, model, ours),
        progress,
        run,
        (*config.notes, *([tie_note] if tie_note else [])),
        (beside_note,) if beside_note else (),
        CheckpointFacts(model_type=config["model_type"]),
        **inherited,
    )


def _tied_as_transformers_does(
    model: ModelConfig, family: Family, named: dict[str, list[TensorRef]]
) -> tuple[ModelConfig, str]:
    """The model with the head that it has there, and what to say of it; a head that is the embedding is taken out.

    Source: `PreTrainedModel.tie_weights` of transformers 5. A stored head that differs from the embedding is used,
    whatever the config says; older versions used the embedding. Of a tied model either of the two may be stored.
    """
    if not model.tie_embeddings or family.head not in named:
        return model, ""
    embedding = next(rule.theirs for rule in family.rules(model) if rule.ours == "embed.weight")
    if embedding not in named:
        named[embedding] = named.pop(family.head)
        return (
            model,
            f"of the embedding and the head, which are one, only {family.head} is stored: it is taken for both",
        )
    if _same(named[embedding][0], named[family.head][0]):
        del named[family.head]
        return model, ""
    return model.with_({"tie_embeddings": False}), (
        f"config.json ties the head to the embedding, but another {family.head} is stored: it is used, as transformers "
        "does since version 5; before, the embedding was"
    )


def _same(a: TensorRef, b: TensorRef) -> bool:
    if a == b:  # one storage under two names
        return True
    from castalia.checkpoint.compare import equal  # imports torch

    return equal(a, b)


def _beside(path: Path, tensors: Mapping[str, TensorRef]) -> tuple[dict[str, Any], str]:
    """What a conversion noted beside the weights, and what to say where that is not all there, or of other weights.

    Of weights that were changed since, the optimizer state and the progress say nothing any more.
    """
    if not (path / BESIDE).is_file():
        return {}, ""
    beside = read_table(path / BESIDE, NOTED)
    stateful, known = beside.get("optimizer_steps") is not None, beside.get("fingerprint")
    if stateful and not has_weights(path, OPTIMIZER_FILES):
        return beside | {"optimizer_steps": None}, (
            f"{OPTIMIZER_FILES[0]}, the optimizer state that {BESIDE} tells of, is missing: the weights can be used "
            "and trained on, but not resumed"
        )
    if known is not None:
        changed = known != fingerprint(tensors)
    else:  # an older conversion's: only masters can tell
        stored = _open_weights(path, OPTIMIZER_FILES) if stateful else {}
        masters = {name.removesuffix(".master"): ref for name, ref in stored.items() if name.endswith(".master")}
        changed = bool(unrounded(tensors, masters))
    if not changed:
        return beside, ""
    return {"config": beside.get("config")}, (
        f"the weights were changed after {BESIDE} and the optimizer state were written (by training elsewhere, say): "
        "the weights count; optimizer state, step and progress, which belong to the old ones, are left out"
    )


def table(family: Family, model: ModelConfig) -> list[Rule]:
    """All rules of a model; their names are without the family's prefix."""
    return family.rules(model) + ([] if model.tie_embeddings else [Rule("head.weight", family.head)])


def _check_blocks(path: Path, names: Iterable[str], expected: int) -> None:
    """Raises CheckpointError where config.json describes fewer or more blocks than there are."""
    found = len({block[1] for name in names if (block := BLOCK.match(name))})
    if found != expected:
        raise CheckpointError(
            f"{path / CONFIG} describes {expected} blocks, the weights have {found}: the two do not belong "
            "together, or one was changed; set the number of layers to what the weights have, or get both again"
        )


def _by_rank(tensors: Mapping[str, TensorRef], family: Family) -> dict[str, list[TensorRef]]:
    heads = {f"{module}.weight": family.head for module in family.head_modules}
    return {heads.get(name, name.removeprefix(family.prefix)): [ref] for name, ref in tensors.items()}


def _optimizer(
    path: Path, beside: Mapping[str, Any], family: Family, model: ModelConfig, weights: Mapping[str, TensorRef]
) -> dict[str, AdamState] | None:
    """What a conversion put beside the weights: tensors `name.role`, by the same names and rules."""
    steps = beside.get("optimizer_steps")
    if steps is None:
        return None
    tensors = _open_weights(path, OPTIMIZER_FILES)
    found: dict[str, dict[str, TensorRef]] = {role: {} for role in ROLES}
    for name, ref in tensors.items():
        stem, _, role = name.rpartition(".")
        found.setdefault(role, {})[stem] = ref
    ours: dict[str, Mapping[str, TensorRef]] = {"master": weights}
    for role in ROLES:
        if found[role] or role != "master":  # fp32 weights are the masters
            ours[role] = to_ours(table(family, model), _by_rank(found[role], family), role)
    if unknown := sorted(steps.keys() - ours["exp_avg"].keys()):
        raise CheckpointError(f"{path / BESIDE}: optimizer_steps has {short(unknown[0])}, which no tensor is called")
    return {
        name: AdamState(
            master=ours["master"][name], exp_avg=ours["exp_avg"][name], exp_avg_sq=ours["exp_avg_sq"][name], step=step
        )
        for name, step in steps.items()
    }


def _run_config(
    path: Path, config: Config, family: Family, model: ModelConfig, beside: Mapping[str, Any], tokenizer: str | None
) -> RunConfig:
    """The architecture of config.json. What a conversion noted of the training is kept where the two agree."""
    words = _tokenizer(path, tokenizer)
    if not beside.get("config"):
        return RunConfig(
            model=model, data=DataConfig(seq_length=min(model.max_positions or 2048, 2048)), tokenizer=words
        )
    run = typed(beside["config"], f"{path / BESIDE}: the config in it", CheckpointError, RunConfig)
    told = {key for key in family.architecture(config) if not key.endswith("dropout")} | {"tie_embeddings"}
    if run.model is None or run.model.vocab_size is None or run.model.padded_vocab_size != model.vocab_size:
        told |= {"vocab_size", "vocab_multiple"}
    merged = model if run.model is None else run.model.with_({key: getattr(model, key) for key in told})
    if run.model is not None and _spelled_out(run.model, run) == _spelled_out(merged, run):
        merged = run.model
    return run.with_({"model": merged} | ({"tokenizer": words} if words.path else {}))


def _spelled_out(model: ModelConfig, run: RunConfig) -> ModelConfig:
    """With the values that None stands for."""
    longest = model.max_positions or run.data.seq_length
    explicit = {"mlp_size": model.mlp_width, "num_kv_heads": model.kv_heads, "max_positions": longest}
    return model.with_(explicit)


def _read_config(path: Path) -> tuple[Config, Family]:
    given = read_table(path, GIVEN)
    architectures = given.get("architectures") or []
    kind = given.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        name = f"model_type {kind!r}" + (f" ({', '.join(map(str, architectures))})" if architectures else "")
        raise CheckpointError(f"{path}: {name} is not supported; supported are {', '.join(FAMILIES)}")
    config = Config(path, given, family)
    if config["quantization_config"]:
        method = config["quantization_config"].get("quant_method")
        raise config.refuse(f"the weights are quantized ({method}), which is not supported; use the original weights")
    return config, family


def _model(config: Config, family: Family) -> ModelConfig:
    vocabulary = {"vocab_size": config["vocab_size"], "vocab_multiple": 1}
    try:
        return ModelConfig(**family.architecture(config), **vocabulary, tie_embeddings=config["tie_word_embeddings"])
    except (ValueError, TypeError) as error:  # pydantic's ValidationError is a ValueError
        raise config.refuse(f"not a usable config: {error}") from error


def _open_weights(path: Path, names: Sequence[str] = WEIGHT_FILES) -> dict[str, TensorRef]:
    """All tensors by name."""
    for name in names:
        index = path / f"{name}.index.json"
        if (path / name).is_file():
            return open_file(path / name)
        if index.is_file():
            return _open_shards(path, index)
    raise CheckpointError(
        f"{path} has a config.json but no weights: expected one of {', '.join(names)}, or an index of its shards. "
        + (
            f"They may lie in DeepSpeed's files in {parts[0].name}, whose names are not NeoX's: zero_to_fp32.py, which "
            "DeepSpeed puts beside them, makes one file of them"
            if (parts := sorted(path.glob("global_step*")))
            else "If it comes from a hub, some files were not fetched."
        )
    )


def _open_shards(path: Path, index: Path) -> dict[str, TensorRef]:
    weight_map = read_table(index, keys({"weight_map": dict[str, str]}, ["weight_map"]))["weight_map"]
    files = sorted(set(weight_map.values()))
    if missing := [name for name in files if not safe_join(path, name).is_file()]:
        raise CheckpointError(
            f"{path} is incomplete: {len(missing)} of {len(files)} shards missing: {', '.join(missing)}"
        )
    shards = {name: open_file(path / name) for name in files}
    if lost := [f"{name} in {file}" for name, file in weight_map.items() if name not in shards[file]]:
        raise CheckpointError(f"{index} names tensors that its files lack: {', '.join(lost[:5])}")
    return {name: shards[file][name] for name, file in weight_map.items()}


def open_file(path: Path) -> dict[str, TensorRef]:
    if path.suffix == ".safetensors":
        return dict(open_safetensors(path))
    loaded = open_pt(path)
    if not isinstance(loaded, dict) or not all(isinstance(ref, FileTensor) for ref in loaded.values()):
        raise CheckpointError(f"{path} does not hold a table of tensors")
    return loaded


def _tokenizer(path: Path, given: str | None) -> TokenizerConfig:
    if given is not None:
        return TokenizerConfig(path=given)
    kinds = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
    found = any(all((path / name).is_file() for name in names) for names in kinds)
    return TokenizerConfig(path=str(path)) if found else TokenizerConfig()


def read_table(path: Path, shape: Any = dict[str, Any]) -> dict[str, Any]:
    """A file with one JSON object. Raises CheckpointError for another, or one whose keys are not of these types."""
    return read_json(path, CheckpointError, shape)
