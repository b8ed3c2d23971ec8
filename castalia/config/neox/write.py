"""Our config in GPT-NeoX's keys: the table of `keys.py` and the joint keys in the opposite direction."""

from __future__ import annotations

from collections.abc import Callable
from math import log2
from typing import Any

from castalia.config.float8_matrices import activation_type
from castalia.config.load import load_config
from castalia.config.neox import model_keys
from castalia.config.neox.keys import KEYS, lower, nonzero, opposite, position, recomputed, truth
from castalia.config.neox.training_keys import SCHEDULE_CHOICES, TOKENIZERS
from castalia.config.schema import EvalConfig, MambaConfig, ModelConfig, RunConfig, RWKVConfig, Source

# Our names -> GPT-NeoX's; where GPT-NeoX has several for one of ours, the first of them.
TOKENIZER_TYPES = {ours: name for name, ours in reversed(TOKENIZERS.items())} | {"sentencepiece": "SPMTokenizer"}
GATED = {ours: name for name, ours in model_keys.GATED.items()}
NORMS = {ours: name for name, (ours, _) in reversed(model_keys.NORMS.items())}
SCHEDULE_KEYS = {choice: key for key, choice in SCHEDULE_CHOICES.items()}
# A row's conversion -> its inverse.
BACK: dict[Any, Callable[[Any], Any]] = {
    None: lambda value: list(value) if isinstance(value, tuple) else value,
    lower: lambda value: value,
    position: lambda value: value,
    opposite: lambda value: not value,
    truth: lambda value: value is True,
    recomputed: lambda value: value != "none",
    nonzero: lambda value: value or 0,
}
# Values that our loader accepts under GPT-NeoX's keys although GPT-NeoX does not know them.
OURS_ALONE = {
    "model.activation": ("sigmoid", "identity"), "model.experts.router": ("balanced",),
    "schedule.style": ("wsd", "inverse_sqrt"),
}  # fmt: skip
# Settings for which GPT-NeoX needs no key: they follow from the tokenizer's files or from the program.
ELSEWHERE = {"model.vocab_size", "model.init", "neox_exact", "tokenizer.path", "tokenizer.merges"}
ELSEWHERE |= {"checkpoint.keep_best", "checkpoint.save_minutes"}  # it has neither, and trains the same without
ELSEWHERE |= {"model.rwkv_over"}  # a note says what it mixes
ELSEWHERE |= {"data.holdout", "data.shuffled_passes"}  # which data it reads: see `other_data` of written_config.py


def to_neox(config: RunConfig) -> dict[str, Any]:
    """GPT-NeoX's keys for a training config. Settings that they cannot express are left out; see `lost`."""
    model = config.model
    keys: dict[str, Any] = {}
    if model:
        keys = {"pipe_parallel_size": 0 if model.init_passes == 2 and config.parallel.pp == 1 else config.parallel.pp}
        keys |= {"model_parallel_size": config.parallel.tp}
    for key, row in KEYS.items():
        if row.kind != "to" or (row.target.startswith("model.") and not model):
            continue
        value = config.at(row.target)
        written = _typed(BACK[row.convert](value), row.default)
        # The architecture is written in full, so that the file says what the model is; other defaults are left out.
        if written is not None and (row.target.startswith("model.") or written != row.default):
            keys[key] = written
    if model:
        keys |= _model(model, config)
    return keys | _training(config) | _precision(config) | _data(config) | _saving(config)


def trainable(config: RunConfig) -> RunConfig:
    """The config with all that GPT-NeoX requires for training, chosen so that it trains as this config does here."""
    data, schedule, steps = config.data, config.schedule, config.train.steps or 1000
    changes: dict[str, Any] = {}
    if not (data.valid if data.train else data.path):
        changes["eval.batches"] = 0
    elif config.eval.batches is None:  # all of them: GPT-NeoX only knows a number
        changes["eval.batches"] = EvalConfig().batches
    if data.train:  # GPT-NeoX wants all three splits or none
        valid = data.valid or data.train
        changes |= {"data.valid": valid, "data.test": data.test or valid}
    if config.eval.every is None:  # GPT-NeoX divides by it, so it must be a number
        changes["eval.every"] = steps + 1
    if not (config.checkpoint.every or config.checkpoint.log_base):  # GPT-NeoX saves nothing without one
        changes["checkpoint.every"] = steps
    if schedule.warmup_steps is not None and (
        schedule.decay_steps or config.train.steps
    ):  # GPT-NeoX only knows a share
        share = min(1.0, schedule.warmup_steps / schedule.decay_end(steps))
        changes |= {"schedule.warmup": share, "schedule.warmup_steps": None}
    return config.with_(changes)


def lost(config: RunConfig, keys: dict[str, Any]) -> dict[str, Any]:
    """Path and value of our settings that are not restored from these keys. Raises ConfigError if they do not load."""
    again = load_config([keys])  # reading the keys back shows what they lost
    before, after = (_flat(_plain(side).model_dump()) for side in (config, again))
    foreign = {path for path, values in OURS_ALONE.items() if before.get(path) in values}
    if config.model and config.model.gated_mlp:  # GPT-NeoX has a gated form of each of them
        foreign.discard("model.activation")
    return {
        path: value
        for path, value in before.items()
        if path not in ELSEWHERE and (path in foreign or after.get(path) != value)
    }


def _model(model: ModelConfig, config: RunConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {"max_position_embeddings": model.max_positions or config.data.seq_length}
    keys["norm"] = NORMS[model.norm]
    keys[model_keys.NORMS[keys["norm"]][1]] = model.norm_eps
    if model.gated_mlp:
        # GPT-NeoX takes 2/3 of the size and halves it, so that a third is left.
        keys |= {"activation": GATED.get(model.activation, "geglu"), "intermediate_size": 3 * model.mlp_width}
    else:
        keys |= {"activation": model.activation.removesuffix("_tanh")}
        keys |= {"intermediate_size": model.mlp_width} if model.mlp_width != 4 * model.hidden_size else {}
        keys |= {"bias_gelu_fusion": True} if model.activation == "gelu_tanh" else {}
    if model.experts:
        keys |= {"moe_num_experts": model.experts.count, "moe_expert_interval": model.experts.every}
        keys |= {"moe_top_k": model.experts.top_k, "moe_router_type": model.experts.router}
        keys |= {"moe_jitter_eps": model.experts.jitter} if model.experts.jitter else {}
        if model.expert_width != -(-4 * model.hidden_size // 256) * 256:  # what GPT-NeoX takes without a key
            keys["intermediate_size"] = model.expert_width
    if model.shared_norm:
        keys["gpt_j_tied"] = True
    if model.other_kinds:
        names = [kind if kind in model.other_kinds else "flash" for kind in model.layer_kinds]
        keys["attention_config"] = [[names, 1]]
        keys |= {"gmlp_attn_dim": model.amlp_size} if "amlp" in names else {}
    if "mamba" in model.other_kinds:
        sizes = model.mamba_sizes
        keys |= {"mamba_use_bias_in_conv": sizes.conv_bias, "mamba_use_bias_in_linears": sizes.linear_bias}
        if model.mamba_width != 2 * model.hidden_size:  # which an MLP beside it must have, too
            keys["intermediate_size"] = model.mamba_width
        elif not model.attention_layers:
            keys.pop("intermediate_size", None)
    if "rwkv" in model.other_kinds:
        keys["dim_att"] = model.hidden_size  # without which GPT-NeoX does not start
        if model.rwkv_width != model.with_({"rwkv": None}).rwkv_width:  # which an MLP beside it must have, too
            keys["intermediate_size"] = model.rwkv_width
        elif not model.attention_layers and "mamba" not in model.other_kinds:
            keys.pop("intermediate_size", None)
    if model.sliding_window and not model.other_kinds:
        keys["attention_config"] = [[["flash"], model.num_layers]]
    keys["hidden_dropout"] = model.hidden_dropout
    # GPT-NeoX multiplies by the number of tensor-parallel ranks.
    keys["make_vocab_size_divisible_by"] = max(1, model.vocab_multiple // config.parallel.tp)
    return keys


def _training(config: RunConfig) -> dict[str, Any]:
    optimizer, schedule = config.optimizer, config.schedule
    params = {"lr": optimizer.lr, "betas": list(optimizer.betas), "eps": optimizer.eps}
    keys: dict[str, Any] = {
        "optimizer": {"type": "Adam", "params": params},
        "gradient_clipping": optimizer.clip_norm or 0.0,
        "zero_optimization": {"stage": config.parallel.zero},
    }
    if config.train.accumulation:
        keys["gradient_accumulation_steps"] = config.train.accumulation
    if warmup := config.data.seq_length_warmup:
        keys["curriculum_learning"] = {
            "enabled": True,
            "curriculum_type": "seqlen",
            "min_difficulty": warmup.start,
            "max_difficulty": config.data.seq_length,
            "schedule_type": "fixed_root",
            "schedule_config": {
                "total_curriculum_step": warmup.steps,
                "difficulty_step": warmup.unit,
                "root_degree": warmup.root,
            },
        }
    if schedule.decay_fraction and not schedule.decay_steps:
        keys["lr_decay_fraction"] = schedule.decay_fraction
    if config.checkpoint.schedule_from:
        keys[SCHEDULE_KEYS[config.checkpoint.schedule_from]] = True
    return keys


def _precision(config: RunConfig) -> dict[str, Any]:
    scale, compute = config.precision.loss_scale, activation_type(config.precision.compute)
    if compute == "bf16":  # without fp32 accumulation GPT-NeoX trains with another optimizer
        return {"precision": "bfloat16", "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if compute != "fp16":
        return {"precision": "fp32"}
    block = {
        "enabled": True,
        "loss_scale": scale.static or 0,
        "loss_scale_window": scale.window,
        "initial_scale_power": round(log2(scale.initial)),
        "hysteresis": scale.hysteresis,
        "min_loss_scale": _typed(scale.minimum, 1),
    }
    if scale.consecutive_hysteresis:
        block["consecutive_hysteresis"] = True
    return {"precision": "fp16", "fp16": block}


def _data(config: RunConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {"data_impl": "mmap"}  # GPT-NeoX fails with its own default, "infer"
    for split in ("train", "valid", "test"):
        sources: tuple[Source, ...] = getattr(config.data, split)
        if sources:
            keys[f"{split}_data_paths"] = [source.path for source in sources]
            keys[f"{split}_data_weights"] = [source.weight for source in sources]
        if any(source.labels for source in sources):
            keys[f"{split}_label_data_paths"] = [source.labels for source in sources]
    if config.tokenizer.kind in TOKENIZER_TYPES:
        keys["tokenizer_type"] = TOKENIZER_TYPES[config.tokenizer.kind]
    return keys


def _saving(config: RunConfig) -> dict[str, Any]:
    checkpoint = config.checkpoint
    keys: dict[str, Any] = {}
    if checkpoint.resume or checkpoint.init_from:
        keys = {"load": checkpoint.resume or checkpoint.init_from, "finetune": checkpoint.init_from is not None}
    if checkpoint.every:
        keys["checkpoint_factor"] = checkpoint.every
    elif checkpoint.log_base:
        keys |= {"checkpoint_factor": checkpoint.log_base, "checkpoint_scale": "log"}
    if config.log.layers_every:
        keys["log_grad_norm"] = True
    return keys | ({"sample_output_file": config.generate.output_file} if config.generate.output_file else {})


def _plain(config: RunConfig) -> RunConfig:
    """The config with defaults written out, so that equal architectures compare as equal."""
    model = config.model
    if model is None:
        return config
    return config.with_(
        {
            "model.mlp_size": model.mlp_width,
            "model.num_kv_heads": model.kv_heads,
            "model.max_positions": model.max_positions or config.data.seq_length,
            "model.shared_norm": model.parallel_residual and model.shared_norm,
            "model.pattern": [model.pattern[i % len(model.pattern)] for i in range(model.num_layers)],
        }
        | ({"model.mamba": _sizes(model) if "mamba" in model.layer_kinds else None})
        | ({"model.rwkv": _rwkv_sizes(model) if "rwkv" in model.layer_kinds else None})
        | ({} if "amlp" in model.layer_kinds else {"model.amlp_size": ModelConfig.model_fields["amlp_size"].default})
        | ({"model.experts.width": model.expert_width} if model.experts else {})
    )


def _sizes(model: ModelConfig) -> MambaConfig:
    """Sizes of Mamba blocks with defaults written out; ranks that GPT-NeoX would choose itself stay open."""
    rank = None if model.mamba_rank == -(-model.hidden_size // 16) else model.mamba_rank
    return model.mamba_sizes.with_({"width": model.mamba_width, "rank": rank})


def _rwkv_sizes(model: ModelConfig) -> RWKVConfig:
    """Sizes of RWKV blocks with the default of the width written out."""
    return model.rwkv_sizes.with_({"width": model.rwkv_width})


def _typed(value: Any, default: Any) -> Any:
    """An integer where GPT-NeoX's default is one, because it accepts no float there."""
    takes_integers = isinstance(default, int) and not isinstance(default, bool)
    return int(value) if takes_integers and isinstance(value, float) and value.is_integer() else value


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in values.items():
        result |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return result
