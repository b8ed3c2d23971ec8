"""GPT-NeoX's keys that describe a run and depend on each other."""

from __future__ import annotations

from typing import Any

from castalia.config.fields import FIELDS
from castalia.config.neox.clipping import effective_clip_norm
from castalia.config.neox.keys import KEYS, ONLINE, lower
from castalia.config.neox.translation import Translation, is_a

# GPT-NeoX's tokenizer type -> our kind.
TOKENIZERS = {
    "GPT2BPETokenizer": "gpt2",
    "HFTokenizer": "hf",
    "HFGPT2Tokenizer": "hf_gpt2",
    "SPMTokenizer": "neox_sentencepiece",
    "CharLevelTokenizer": "char",
    "TiktokenTokenizer": "tiktoken",
}
# GPT-NeoX's flag -> `checkpoint.schedule_from`.
SCHEDULE_CHOICES = {"override_lr_scheduler": "config", "use_checkpoint_lr_scheduler": "checkpoint"}
OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "cpu_adam": "adamw", "cpu_torch_adam": "adamw"}
OPTIMIZERS |= {name: name for name in ("lion", "sgd", "adafactor", "muon")}
# Optimizers that are refused, and why.
OTHER_OPTIMIZERS = {
    "onebitadam": "its gradients lose precision on the way between ranks",
    "sm3": "adafactor saves as much memory",
    "madgrad_wd": "nobody has needed it yet",
}
# What GPT-NeoX and DeepSpeed use where `params` leave a value out.
OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": {"betas": [0.9, 0.999], "eps": 1e-8},
    "lion": {"betas": [0.9, 0.99]},
    "sgd": {"momentum": 0.0},
    "adafactor": {},
    "muon": {"betas": [0.9, 0.999], "eps": 1e-8, "momentum": 0.95},
}


def stages(work: Translation) -> None:
    """Pipeline ranks. 0 and 1 both mean no pipeline, but with 0 GPT-NeoX draws its initial weights twice."""
    key = "pipe_parallel_size"
    if work.has(key):
        work.set("parallel.pp", work[key] or 1, key)
    if work.architecture:
        work.set("model.init_passes", 1 if work[key] else 2, key)


def optimizer(work: Translation) -> None:
    """The optimizer and its parameters. `lr` alone counts only where it comes from a later source than the block."""
    if not work.has("optimizer"):
        if work.has("lr"):
            work.set("optimizer.lr", work["lr"], "lr")
        return
    block = work["optimizer"]
    params = block.get("params")
    if not isinstance(params, dict) or not isinstance(block.get("type"), str):
        work.error("optimizer", 'needs a type and params: {"type": "Adam", "params": {"lr": 6.0e-4}}')
        return
    name = OPTIMIZERS.get(block["type"].lower())
    if name is None:
        why = OTHER_OPTIMIZERS.get(block["type"].lower(), "it is not built in")
        work.error("optimizer", f"is refused: {block['type']}: {why}; use one of {', '.join(OPTIMIZERS)}")
        return
    work.set("optimizer.name", name, "optimizer")
    known = {"lr": None, **OPTIMIZER_DEFAULTS[name]}
    for key, default in known.items():
        if key in params:
            work.set_inner(f"optimizer.{key}", params[key], "optimizer", params, key)
        elif default is not None:
            work.set(f"optimizer.{key}", default)
    if "weight_decay" in params:
        if work.has("weight_decay") and work["weight_decay"] != params["weight_decay"]:
            work.error("weight_decay", f"is contradicted by optimizer.params.weight_decay: {params['weight_decay']}")
        work.set_inner("optimizer.weight_decay", params["weight_decay"], "optimizer", params, "weight_decay")
    # GPT-NeoX sets lr from the block; an `lr` given later must win all the same.
    if work.has("lr") and work.given["lr"].precedence > work.given["optimizer"].precedence:
        work.set("optimizer.lr", work["lr"], "lr")
    elif work.has("lr") and work["lr"] != params.get("lr"):
        work.idle("lr", "optimizer.params.lr replaces it")
    # Parameters whose usual value changes nothing here; with another value they are refused.
    harmless = {"adam_w_mode": True, "bias_correction": True, "amsgrad": False, "nesterov": False, "dampening": 0}
    for key in params.keys() - known.keys() - {"weight_decay", "torch_adam"}:
        if key not in harmless or params[key] != harmless[key]:
            text = f"the parameter {key}: {params[key]!r} is not built in for {block['type']}"
            work.error("optimizer", f"is refused: {text}; remove it")


def clipping(work: Translation) -> None:
    """The clip norm, where 0 means none; a note says what becomes of 1.0, which GPT-NeoX ignores."""
    key = "gradient_clipping" if work.has("gradient_clipping") or not work.has("clip_grad") else "clip_grad"
    if key == "gradient_clipping" and work.has("clip_grad") and work["clip_grad"] != work[key]:
        work.idle("clip_grad", "gradient_clipping replaces it")
    if not work.has(key):
        return
    work.set("optimizer.clip_norm", work[key] or None, key)
    if effective_clip_norm(work[key], "head") is None:
        exact = work.ours.get("neox_exact")
        done = "is left off, as in GPT-NeoX" if exact and exact.value else "clips here"
        work.note(key, f"{done}: GPT-NeoX leaves clipping off at exactly its default, 1.0 (neox_exact)")


def zero(work: Translation) -> None:
    """ZeRO's stage; the other keys of the block tune DeepSpeed's buffers."""
    if not work.has("zero_optimization"):
        return
    block = work["zero_optimization"]
    if "stage" not in block:
        work.error("zero_optimization", "needs a stage from 0 to 3: {stage: 1}")
        return
    work.set_inner("parallel.zero", block["stage"], "zero_optimization", block, "stage")
    hints = sorted(block.keys() - {"stage"})
    if hints:
        tune = "they tune" if len(hints) > 1 else "it tunes"
        work.idle("zero_optimization", f"{tune} DeepSpeed's buffers, FSDP sizes its own", hints)


def precision(work: Translation) -> None:
    """The compute dtype, from enabled blocks and the plain `precision`: the latest file wins, one file must agree."""
    names = {"fp16": "fp16", "bf16": "bf16", "bfloat16": "bf16", "fp32": "fp32"}
    wishes: list[tuple[int, str, str]] = []
    for key in ("fp16", "bf16", "precision"):
        if not work.has(key):
            continue
        value, precedence = work[key], work.given[key].precedence
        if key == "precision":
            wish = names.get(str(lower(value)))
        elif isinstance(value, dict) and isinstance(value.get("enabled"), bool):
            wish = names.get(str(value.get("type", key)))
            if not value["enabled"]:
                continue
        else:
            work.error(key, f"needs a block: {key}: {{enabled: true}}")
            continue
        if wish is None:
            work.error(key, "is none of fp16, bfloat16, fp32")
        else:
            wishes.append((precedence, wish, key))
    # An enabled block of an earlier file gives way to a later file, as a plain value would.
    latest = [wish for wish in wishes if wish[0] == max(wishes)[0]]
    if len({wish for _, wish, _ in latest}) > 1:
        work.error(latest[-1][2], f"contradicts {latest[0][2]} ({work.given[latest[0][2]].origin}); keep one")
    elif latest:
        work.set("precision.compute", latest[0][1], latest[0][2])
        if latest[0][1] == "fp16" and work.has("fp16"):
            loss_scale(work)
    elif work.training:
        work.set("precision.compute", "fp32")


def loss_scale(work: Translation) -> None:
    """DeepSpeed's block `fp16`."""
    fields = {"loss_scale_window": "window", "min_loss_scale": "minimum"}
    fields |= {name: name for name in ("hysteresis", "consecutive_hysteresis")}
    block = work["fp16"]
    for key, value in block.items():
        if key in fields:
            work.set_inner(f"precision.loss_scale.{fields[key]}", value, "fp16", block, key)
        elif key == "loss_scale":  # 0 means dynamic
            work.set_inner("precision.loss_scale.static", value or None, "fp16", block, key)
        elif key == "initial_scale_power":
            if is_a(value, int) and 0 <= value <= 127:
                work.set_inner("precision.loss_scale.initial", 2.0**value, "fp16", block, key)
            else:
                work.error("fp16", f"needs a whole initial_scale_power from 0 to 127, not {value!r}")
        elif key not in ("fp16", "enabled", "type"):
            work.idle("fp16", "it is DeepSpeed's own option", [key])


def data(work: Translation) -> None:
    """The corpora of all splits with their labels, weights, rejected texts and rewards."""
    if work.training:
        work.set("data.holdout", "contiguous")
        work.set("data.shuffled_passes", None)
    pairs = lower(work["dataset_impl"]) == "pairwise"
    if lower(work["dataset_impl"]) not in ("gpt2", "pairwise"):
        work.error("dataset_impl", f"is refused: {ONLINE}; use gpt2 or pairwise")
    for split in ("train", "valid", "test"):
        plain = {"labels": f"{split}_label_data_paths", "rewards": f"{split}_reward_data_paths"}
        chosen = {"labels": f"pos_{split}_label_data_paths"}
        rejected = {"path": f"neg_{split}_data_paths", "labels": f"neg_{split}_label_data_paths"}
        of_pairs = [f"pos_{split}_data_paths", *chosen.values(), *rejected.values()]
        for key in [f"{split}_data_paths", *plain.values()] if pairs else of_pairs:
            if work.has(key):
                work.idle(key, f"dataset_impl is {lower(work['dataset_impl'])}")
        weights = {"weight": f"{split}_data_weights"}
        if pairs:
            _sources(work, split, f"pos_{split}_data_paths", chosen | weights, rejected)
        else:
            _sources(work, split, f"{split}_data_paths", plain | weights, {})


def _sources(work: Translation, split: str, key: str, fields: dict[str, str], rejected: dict[str, str]) -> None:
    """Set the sources of one split: the paths of `key`, and lists of equal length for their fields (field -> key)."""
    others = [*fields.values(), *rejected.values()]
    owners = dict.fromkeys(others, key) | ({rejected["labels"]: rejected["path"]} if rejected else {})
    orphans = [other for other in others if work.has(other) and not work.has(owners[other])]
    for other in orphans:
        work.error(other, f"belongs to {owners[other]}, which is not given; add it or remove this key")
    if orphans or not work.has(key):
        return
    columns = {name: _as_list(work[name]) for name in (key, *others) if work.has(name)}
    for other, values in columns.items():
        if len(values) != len(columns[key]):
            work.error(other, f"has {len(values)} entries, {key} has {len(columns[key])}; they go in pairs")
            return
    # GPT-NeoX derives the corpora of reference log-probabilities from the names of the texts.
    reference = work["precompute_model_name"] if lower(work["train_impl"]) in ("dpo", "kto") else None
    sources: list[dict[str, Any]] = []
    for number, path in enumerate(columns[key]):
        given, worse = (
            {field: columns[name][number] for field, name in names.items() if name in columns}
            for names in (fields, rejected)
        )
        sources.append({"path": path, **given} | ({"rejected": worse} if worse else {}))
        for text in (sources[-1], worse) if reference else ():
            text["references"] = f"{text.get('path')}_{reference}"
    work.set(f"data.{split}", sources, *columns, "precompute_model_name")


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else value


def curriculum(work: Translation) -> None:
    """DeepSpeed's legacy curriculum learning by sequence length, which becomes `data.seq_length_warmup`."""
    key = "curriculum_learning"
    block = work[key] or {}
    if not block.get("enabled"):
        return
    kind, style = block.get("curriculum_type"), block.get("schedule_type")
    inner = block.get("schedule_config")
    if kind != "seqlen" or style not in ("fixed_linear", "fixed_root") or not isinstance(inner, dict):
        text = f"curriculum_type: {kind!r} with schedule_type: {style!r} is not built in"
        work.error(key, f"is refused: {text}; use seqlen with fixed_linear or fixed_root and their schedule_config")
        return
    length = work.ours.get("data.seq_length", work.given.get("seq_length"))
    whole = length.value if length else FIELDS["data.seq_length"].default
    # Ours always rises to the full length.
    if block.get("max_difficulty") != whole:
        text = f"max_difficulty: {block.get('max_difficulty')!r} is not the sequences' length"
        work.error(key, f"is refused: {text}; set it and seq_length, now {whole}, to the same")
    names = {"start": (block, "min_difficulty"), "steps": (inner, "total_curriculum_step")}
    names["multiple"] = (inner, "difficulty_step")
    if style == "fixed_root":
        names["root"] = (inner, "root_degree")
    for name, (part, inner_key) in names.items():
        if inner_key in part:
            work.set_inner(f"data.seq_length_warmup.{name}", part[inner_key], key, part, inner_key)
        else:
            work.error(key, f"needs {inner_key}")


OBJECTIVES = {"normal": "causal", "dpo": "dpo", "kto": "kto", "rm": "reward"}


def preferences(work: Translation) -> None:
    """The objective and its settings; those of another objective have no effect."""
    name = lower(work["train_impl"])
    if name not in OBJECTIVES:
        work.error("train_impl", f"is refused: {name} is not built in; use one of {', '.join(OBJECTIVES)}")
        return
    if work.has("train_impl"):
        work.set("train.objective", OBJECTIVES[name], "train_impl")
    owners = {
        "dpo_beta": ("dpo", "preference.beta"),
        "dpo_reference_free": ("dpo", "preference.reference_free"),
        "kto_beta": ("kto", "preference.beta"),
        "kto_desirable_weight": ("kto", "preference.desirable_weight"),
        "kto_undesirable_weight": ("kto", "preference.undesirable_weight"),
        "z_loss": ("rm", "train.z_loss"),
    }
    for key, (owner, path) in owners.items():
        if work.has(key) and owner == name:
            work.set(path, work[key], key)
        elif work.has(key) and work[key] != KEYS[key].default:
            work.idle(key, f"it belongs to train_impl: {owner}")
    if work.has("precompute_model_name") and name not in ("dpo", "kto"):
        work.idle("precompute_model_name", "it belongs to train_impl: dpo and kto")


def tokenizer(work: Translation) -> None:
    """The kind of tokenizer, by default GPT-NeoX's, if the config names one at all."""
    if not work.has("tokenizer_type", "vocab_file", "merge_file"):
        return
    # GPT-NeoX compares the name in lower case.
    kinds = {lower(name): kind for name, kind in TOKENIZERS.items()}
    kind = kinds.get(lower(work["tokenizer_type"]))
    if kind is None:
        work.error("tokenizer_type", f"is none of {', '.join(kinds)} (case does not matter)")
    elif work.has("tokenizer_type") or "tokenizer.kind" not in work.ours:
        work.set("tokenizer.kind", kind, "tokenizer_type")
        if kind != "gpt2" and work.has("merge_file"):
            work.idle("merge_file", f"{work['tokenizer_type']} reads no merges beside its file")
            work.settings.pop("tokenizer.merges", None)


def batch(work: Translation) -> None:
    """The accumulation. GPT-NeoX's default of 1 is not applied, so that it can be inferred from the batch size."""
    key = "gradient_accumulation_steps"
    if work.has(key):
        work.set("train.accumulation", work[key], key)


def schedule(work: Translation) -> None:
    """The end of the decay, and which schedule a resumed run follows."""
    if work.has("lr_decay_fraction") and not work.has("lr_decay_iters"):
        work.set("schedule.decay_fraction", work["lr_decay_fraction"], "lr_decay_fraction")
    elif work.has("lr_decay_fraction"):
        work.idle("lr_decay_fraction", "lr_decay_iters is given")
    chosen = [key for key in SCHEDULE_CHOICES if work[key]]
    if len(chosen) == 2:
        work.error(chosen[0], f"and {chosen[1]} exclude each other; keep one")
    elif chosen:
        work.set("checkpoint.schedule_from", SCHEDULE_CHOICES[chosen[0]], chosen[0])


def loading(work: Translation) -> None:
    """`load` resumes a run; with `finetune` it gives only the initial weights of a new one."""
    if work.has("load") and work["load"] != "":
        target = "checkpoint.init_from" if work["finetune"] else "checkpoint.resume"
        work.set(target, work["load"], "load", "finetune")
    elif work["finetune"] and not {"checkpoint.init_from", "checkpoint.resume"} & work.ours.keys():
        work.error("finetune", "has nothing to start from: give load (or checkpoint.init_from), or remove finetune")


def saving(work: Translation) -> None:
    """When checkpoints are saved: at multiples of a number, or at its powers. GPT-NeoX knows no other occasion."""
    if work.training:
        work.set("checkpoint.keep_best", False)
        work.set("checkpoint.save_minutes", None)
    if not work.has("checkpoint_factor"):
        return
    keys = ("checkpoint_factor", "checkpoint_scale")
    scale, factor = lower(work["checkpoint_scale"]), work["checkpoint_factor"]
    if scale == "log":
        work.set("checkpoint.log_base", factor, *keys)
    elif scale == "linear":
        whole = isinstance(factor, float) and factor.is_integer()
        work.set("checkpoint.every", int(factor) if whole else factor, *keys)
    else:
        work.error("checkpoint_scale", "is none of linear, log")


def trackers(work: Translation) -> None:
    """Weights & Biases, CSV and TensorBoard, from plain keys and from DeepSpeed's monitor blocks if `enabled`."""
    fields = {"wandb_group": "group", "wandb_run_name": "name", "wandb_team": "team", "wandb_project": "project"}
    fields["wandb_host"] = "host"
    if work["use_wandb"]:
        for key, name in fields.items():
            work.set(f"log.wandb.{name}", work[key], "use_wandb", key)
    for key in fields if not work["use_wandb"] else ():
        if work.has(key):
            work.idle(key, "use_wandb is off")
    for key in ("wandb", "csv_monitor", "tensorboard"):
        block = work[key] or {}
        if not block.get("enabled"):
            continue
        if key == "wandb":
            for name in ("project", "group", "team"):
                work.set(f"log.wandb.{name}", block.get(name, FIELDS[f"log.wandb.{name}"].default), key)
        elif key == "csv_monitor":
            work.set("log.csv", True, key)
        elif not work.has("tensorboard_dir"):
            work.set("log.tensorboard", f"{block.get('output_path') or 'tensorboard'}", key)


def looking_inside(work: Translation) -> None:
    """Layer statistics and profiles."""
    layers = [key for key in ("log_grad_norm", "log_param_norm", "log_grad_pct_zeros") if work[key]]
    if layers:
        work.set("log.layers_every", work["log_interval"], *layers)
    wanted = [key for key in ("profile", "memory_profiling") if work[key]]
    details = ("profile_step_start", "profile_step_stop", "memory_profiling_path")
    if wanted:
        for key, name in zip(details, ("start", "stop", "dir"), strict=True):
            work.set(f"log.profile.{name}", work[key], *wanted, key)
    for key in details if not wanted else ():
        if work.has(key) and work[key] != KEYS[key].default:
            work.idle(key, "profile is off")


def text_file(work: Translation) -> None:
    """The file for generated text. GPT-NeoX has a default, which applies only to configs that generate."""
    if work.has("sample_output_file", "text_gen_type"):
        work.set("generate.output_file", work["sample_output_file"], "sample_output_file")


TRAINING = (
    stages, optimizer, clipping, zero, precision, data, curriculum, preferences, tokenizer, batch, schedule, loading,
    saving, trackers, looking_inside, text_file,
)  # fmt: skip
