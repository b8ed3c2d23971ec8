"""A checkpoint's run as NeoX's config describes it for given ranks and era: vocabulary, batch, schedule, loss scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import inf, nextafter
from pathlib import Path
from typing import Any

import torch

from castalia.checkpoint.file_plan import TargetLayout, WriteOptions
from castalia.checkpoint.formats.deepspeed.assemble import whole
from castalia.checkpoint.neox_defects import clip_norm_of
from castalia.checkpoint.restore import architecture, load_tokenizer_for
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.batch import batch_plan, planned_dp
from castalia.config.layout_rules import indivisible_splits
from castalia.config.lr_schedule import LearningRate
from castalia.config.neox.clipping import IGNORED_CLIP_NORM, effective_clip_norm
from castalia.config.neox.write import lost, to_neox, trainable
from castalia.config.schema import (
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TokenizerConfig,
    TrainConfig,
)
from castalia.config.tensor_table import row_of
from castalia.data.config_corpora import repeats_order
from castalia.errors import CastaliaError, CheckpointError, ConfigError, DataError

PRECISIONS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
MULTIPLES = (128, 64, 256, 512, 1024, 32, 16, 8, 4, 2, 1)  # of the vocabulary, as people choose them
# Settings that the first release cannot change, with the values that it has.
FIRST_RELEASE = {
    "gated_mlp": False, "qk_norm": False, "attention_bias": True, "mlp_bias": True, "sliding_window": None,
}  # fmt: skip
SCHEDULE = ("start_lr", "warmup_iter", "num_iters", "decay_style", "end_iter", "min_lr")  # of its stored state
# Keys that it does not know, and does not start with.
LATER_KEYS = {
    "allow_chopped", "lr_decay_fraction", "num_kv_heads", "pack_impl", "peak_theoretical_tflops", "sequence_parallel",
    "sliding_window_width", "test_label_data_paths", "train_epochs", "train_label_data_paths",
    "use_bias_in_attn_linear", "use_bias_in_mlp", "use_qk_layernorm", "valid_label_data_paths",
}  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """The size of the vocabulary and its padding."""

    logical: int  # tokens
    multiple: int  # `make_vocab_size_divisible_by`, which NeoX multiplies by the number of tensor ranks
    rows: int  # of the embedding on all ranks together, padding included


@dataclass(frozen=True)
class NeoXTarget:
    """The run in NeoX's terms."""

    config: RunConfig
    model: ModelConfig
    keys: dict[str, Any]  # of its config file
    dtype: torch.dtype
    vocabulary: Vocabulary
    clip: float  # the largest gradient norm, as in optimizer files; 0.0: no clipping
    notes: tuple[str, ...]


def adapted(checkpoint: Checkpoint, options: WriteOptions, tokenizer: TokenizerConfig) -> NeoXTarget:
    """The run in NeoX's terms. `tokenizer`: as it is written.

    Raises CheckpointError that names the settings that NeoX does not have.
    """
    model, layout, path = architecture(checkpoint), options.layout, checkpoint.path
    assert checkpoint.config is not None
    check_layout(model, layout, path)
    dtype = weight_dtype(checkpoint)
    rows = vocabulary(checkpoint, model, layout.tp)
    train, batch_note = step_batch(checkpoint, layout)
    epsilon = options.era == "head" or model.norm != "rmsnorm"  # inside the root, as this release has it
    if model.norm == "rmsnorm" and model.rms_eps_inside != epsilon:
        raise _refused(path, {"model.rms_eps_inside": model.rms_eps_inside})
    changes = {
        "vocab_multiple": rows.multiple * layout.tp,
        "init_passes": 1 if layout.pp else 2,
        "rms_eps_inside": True,
    }
    ranks = {"tp": layout.tp, "pp": max(1, layout.pp), "cp": 1, "zero": layout.zero}
    ranks["gpus"] = layout.tp * max(1, layout.pp) * layout.dp
    data = checkpoint.config.data
    # A config that only describes a model may have a longer one.
    longest = min(data.seq_length, model.max_positions or data.seq_length)
    if {"gmlp", "amlp"} & set(model.layer_kinds):  # NeoX makes their spatial matrix of this size
        longest = model.max_positions or longest
    optimizer, clip, clip_note = _clipping(checkpoint, options.era)
    config = checkpoint.config.with_(
        {
            "checkpoint": _saving(checkpoint, options.folder),
            "optimizer": optimizer,
            "tokenizer": tokenizer,
            "data.seq_length": longest,
            "model": model.with_(changes),
            "parallel": checkpoint.config.parallel.with_(ranks),
            "precision.compute": PRECISIONS[dtype],
            "train": train,
        }
    )
    config = trainable(config)
    keys = to_neox(config) | {"no_load_rng": True}
    if "mamba" in model.other_kinds:
        if dtype == torch.bfloat16:
            raise CheckpointError(f"{path}: NeoX has no Mamba layers in bf16; write them with --dtype fp32 or fp16")
        if layout.pp > 1:
            raise CheckpointError(f"{path}: NeoX cannot run Mamba layers in pp={layout.pp} stages; use pp=1")
        if dtype == torch.float16:
            keys["mamba_selective_fp32_params"] = keeps_fp32(checkpoint)
    if "rwkv" in model.other_kinds and layout.pp > 1:
        raise CheckpointError(f"{path}: NeoX puts all RWKV layers into the first of pp={layout.pp} stages; use pp=1")
    if options.era == "v1":
        _check_first_release(model, path)
        keys = {key: value for key, value in keys.items() if key not in LATER_KEYS} | _silent_today(config)
    notes = [batch_note, clip_note, *_left_out(checkpoint, config, keys), *other_data(checkpoint.config)]
    notes.append(rows_note(checkpoint, rows))
    if checkpoint.config.precision.compute == "fp8":
        notes.append(f"precision.compute=fp8: NeoX continues in {PRECISIONS[dtype]} (its te_fp8 is another recipe)")
    rounds = layout.tp & (layout.tp - 1) or (layout.tp > 1 and dtype == torch.float16)
    if rounds and model.parallel_residual and (model.attention_bias or model.mlp_bias):
        notes.append(
            f"attn.out.bias and mlp.down.bias are divided by {layout.tp}, which rounds"
            + (" the smallest values of fp16" if not layout.tp & (layout.tp - 1) else "")
            + ": their sum may differ in the last bit"
        )
    if "rwkv" in model.other_kinds:
        notes.append(
            "NeoX mixes RWKV layers over the rows of a micro-batch, not over the tokens of a sequence: there these "
            "weights give other logits" + ("" if dtype == torch.bfloat16 else ", and only in bf16: use --dtype bf16")
        )
    if checkpoint.optimizer is None:
        notes.append("there is no optimizer state: NeoX can only start from these weights, with finetune: true")
    if not (config.train.steps or config.train.epochs):
        notes.append("how many steps to train is not known: set train_iters in configs/config.yml")
    return NeoXTarget(config, config.model or model, keys, dtype, rows, clip, tuple(note for note in notes if note))


def _saving(checkpoint: Checkpoint, folder: Path | None) -> CheckpointConfig:
    """The settings by which NeoX loads from, and saves to, the folder that is being written."""
    assert checkpoint.config is not None
    saving = checkpoint.config.checkpoint.with_({"resume": None, "init_from": None, "step": None})
    if folder is None:
        return saving
    run = str(folder.parent)  # which has `latest`
    start = "init_from" if checkpoint.optimizer is None else "resume"
    return saving.with_({start: run, "dir": run})


def _clipping(checkpoint: Checkpoint, era: str) -> tuple[OptimizerConfig, float, str]:
    """The optimizer settings with which NeoX clips as the run did, the norm in its files, and a note."""
    assert checkpoint.config is not None
    optimizer, norm = checkpoint.config.optimizer, clip_norm_of(checkpoint)
    if norm is None:
        unseen = effective_clip_norm(optimizer.clip_norm, era) is None
        return optimizer if unseen else optimizer.with_({"clip_norm": None}), 0.0, ""
    if effective_clip_norm(norm, era) is not None:
        return optimizer, norm, ""
    above = nextafter(norm, inf)
    note = f"gradients are clipped at {norm}: written as {above}, since NeoX does not clip at its default"
    return optimizer.with_({"clip_norm": above}), above, note


def check_layout(model: ModelConfig, layout: TargetLayout, path: str) -> None:
    """Raises CheckpointError unless the ranks divide the model."""
    if layout.tp > 1 and model.other_kinds:
        named = " and ".join(model.other_kinds)
        raise CheckpointError(f"{path}: {named} blocks cannot be divided over tp={layout.tp} ranks; use tp=1")
    for _, parts, size in indivisible_splits(model, layout.tp):
        raise CheckpointError(f"{path}: {size} {parts} do not divide over tp={layout.tp}; use a divisor")
    if layout.pp > model.num_layers:
        raise CheckpointError(f"{path}: {model.num_layers} blocks are too few for pp={layout.pp} stages")


def weight_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the weights. Raises CheckpointError for several dtypes, and for those that NeoX does not have."""
    dtypes = {ref.dtype for ref in checkpoint.model.values()}
    if keeps_fp32(checkpoint):
        return torch.float16
    if len(dtypes) > 1 or not dtypes <= PRECISIONS.keys():
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise CheckpointError(
            f"{checkpoint.path}: the weights are of {names}; choose one of fp32, bf16, fp16 (--dtype)"
        )
    return dtypes.pop()


def keeps_fp32(checkpoint: Checkpoint) -> bool:
    """Whether weights are as NeoX has those of Mamba layers in fp16: all tensors without weight decay are fp32."""
    model = checkpoint.config.model if checkpoint.config else None
    if model is None or "mamba" not in model.other_kinds:
        return False
    kept = {name: torch.float16 if row_of(name).decays else torch.float32 for name in checkpoint.model}
    return all(ref.dtype == kept[name] for name, ref in checkpoint.model.items())


def vocabulary(checkpoint: Checkpoint, model: ModelConfig, tp: int) -> Vocabulary:
    """The vocabulary for `tp` tensor ranks; its rows are kept if they divide over the ranks.

    The multiple is chosen so that NeoX, which pads the vocabulary of its tokenizer, gets the same number of rows.
    """
    rows, logical = checkpoint.model["embed.weight"].shape[0], model.vocab_size or 1
    with suppress(CastaliaError):  # `our_tokenizer` notes that the tokenizer is missing
        logical = load_tokenizer_for(checkpoint).vocab_size
    target = rows if rows % tp == 0 else _padded(rows, MULTIPLES[0] * tp)
    own = model.vocab_multiple // tp if model.vocab_multiple > tp and model.vocab_multiple % tp == 0 else MULTIPLES[0]
    fitting = (multiple for multiple in (own, *MULTIPLES) if _padded(logical, multiple * tp) == target)
    return Vocabulary(logical, next(fitting, target // tp), target)


def rows_note(checkpoint: Checkpoint, vocabulary: Vocabulary) -> str:
    """What to tell the user about rows that are added to the vocabulary; empty if none are."""
    added = vocabulary.rows - checkpoint.model["embed.weight"].shape[0]
    return (
        f"{added} rows of zeros pad the vocabulary to {vocabulary.rows}, which divides over the ranks" if added else ""
    )


def schedule(checkpoint: Checkpoint, config: RunConfig) -> dict[str, Any] | None:
    """The state of NeoX's learning-rate schedule; None where the config does not say how long it is."""
    progress, own = checkpoint.progress, config.schedule
    updates = progress.step - progress.skipped
    stored = {name: value for name, value in (progress.schedule or {}).items() if name in SCHEDULE}
    if {"start_lr", "warmup_iter", "end_iter", "min_lr"} <= stored.keys():
        return {**stored, "num_iters": updates}
    end = own.decay_end(config.train.steps or 0)
    if not end:
        return None
    return {
        "start_lr": config.optimizer.lr,
        "warmup_iter": own.warmup_length(end),
        "num_iters": updates,
        "decay_style": own.style,
        "end_iter": end,
        "min_lr": own.min_lr,
    }


def next_rate(state: Mapping[str, Any], era: str | None = None) -> float:
    """The learning rate of the next update as NeoX computes it, which is stored in ZeRO's files."""
    return LearningRate.of_stored(state, era)(state["num_iters"])


def loss_scaler(checkpoint: Checkpoint, config: RunConfig, dtype: torch.dtype, era: str) -> dict[str, Any]:
    """The attributes of DeepSpeed's loss scaler."""
    scale = config.precision.loss_scale
    dynamic = dtype == torch.float16 and scale.static is None
    marks: dict[str, Any] = {"dynamic": dynamic} if era == "head" else {}
    if not dynamic:
        return {"cur_scale": scale.static or 1.0, **marks} if dtype == torch.float16 else {"cur_scale": 1.0, **marks}
    stored = checkpoint.progress.loss_scale or {}
    counters = {"cur_scale": scale.initial, "cur_iter": checkpoint.progress.step, "last_overflow_iter": -1}
    counters["cur_hysteresis"] = scale.hysteresis
    return {
        **{name: whole(stored.get(name, value)) for name, value in counters.items()},
        "scale_factor": 2.0,
        "scale_window": scale.window,
        "min_scale": whole(scale.minimum),
        "delayed_shift": scale.hysteresis,
        "consecutive_hysteresis": scale.consecutive_hysteresis,
        "raise_error_at_min_scale": True,
        **marks,
        **({"dtype": dtype} if era == "head" else {}),
    }


def deepspeed_config(keys: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """The part of its config that NeoX passes on to DeepSpeed."""
    names = ("optimizer", "fp16", "bf16", "zero_optimization", "data_types")
    train = config.train
    batch = {"train_batch_size": train.batch_size, "train_micro_batch_size_per_gpu": train.micro_batch_size}
    if train.accumulation != 1:
        batch["gradient_accumulation_steps"] = train.accumulation
    result = {key: value for key, value in batch.items() if value} | {key: keys[key] for key in names if key in keys}
    clip = keys["gradient_clipping"]
    return result if clip == IGNORED_CLIP_NORM else result | {"gradient_clipping": clip}


def step_batch(checkpoint: Checkpoint, layout: TargetLayout) -> tuple[TrainConfig, str]:
    """The batch of a step on these ranks, and a note if it does not divide over them."""
    config = checkpoint.config
    assert config is not None
    old = checkpoint.facts.dp or planned_dp(config) or 1
    try:
        batch, micro, _ = batch_plan(config, old)
    except ConfigError:
        return config.train, ""
    if batch % layout.dp:
        none = {"batch_size": None, "accumulation": None, "micro_batch_size": micro}
        note = f"a batch of {batch} sequences does not divide over dp={layout.dp}: set another in configs/config.yml"
        return config.train.with_(none), note
    share = batch // layout.dp
    micro = next(size for size in range(min(micro, share), 0, -1) if share % size == 0)
    sizes = {"batch_size": batch, "micro_batch_size": micro, "accumulation": share // micro}
    return config.train.with_(sizes), ""


def _left_out(checkpoint: Checkpoint, config: RunConfig, keys: dict[str, Any]) -> list[str]:
    """Notes on settings for which NeoX has no key.

    Raises CheckpointError for settings of the model, and with an optimizer state also for those of the optimizer.
    """
    try:
        missing = lost(config, keys)
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint.path}: NeoX cannot hold this run: {error}") from error
    needed = ("model.", "optimizer.", "schedule.") if checkpoint.optimizer else ("model.",)
    if refused := {name: value for name, value in missing.items() if name.startswith(needed)}:
        raise _refused(checkpoint.path, refused)
    if not missing:
        return []
    return [f"NeoX has no key for {_assignments(missing)}: left out of configs/config.yml"]


def other_data(config: RunConfig) -> Iterator[str]:
    """Notes on what NeoX trains on, if it continues a run, that the run would not have."""
    data = config.data
    if data.path and data.holdout != "contiguous":
        yield (
            f"data.holdout={data.holdout} holds out documents by a hash of each; NeoX takes the last ones, and would "
            "train on documents that were held out so far"
        )
    if data.shuffled_passes is None or not (data.path or data.train) or not config.train.steps:
        return
    shuffled = f"data.shuffled_passes={data.shuffled_passes}: NeoX shuffles all passes of a run together"
    try:
        if repeats_order(config):
            yield f"{shuffled}; this run takes more of them, so that NeoX would continue in another order"
    except (DataError, ConfigError):
        yield f"{shuffled}; in a run of more of them (its data are not here) it would continue in another order"


def _check_first_release(model: ModelConfig, path: str) -> None:
    wrong = {
        f"model.{key}": getattr(model, key) for key, value in FIRST_RELEASE.items() if getattr(model, key) != value
    }
    if model.kv_heads != model.num_heads:
        wrong["model.num_kv_heads"] = model.num_kv_heads
    if model.mlp_width != 4 * model.hidden_size:
        wrong["model.mlp_size"] = model.mlp_size
    if model.experts:
        wrong["model.experts"] = "a mixture"
    if model.other_kinds:
        wrong["model.pattern"] = ", ".join(model.pattern)
    if wrong:
        raise CheckpointError(f"{path}: the first release has no {_assignments(wrong)}; use --era head")


def _silent_today(config: RunConfig) -> dict[str, Any]:
    """Keys that the first release reads otherwise than today's where its config does not have them.

    It cuts the head by the hidden size, where files and today's release cut the vocabulary; its weight decay is 0.01,
    its exponent for weights by documents 0.3, and it divides by an interval of logging that has no default.
    """
    keys: dict[str, Any] = {"output_layer_parallelism": "column", "weight_decay": config.optimizer.weight_decay}
    if config.data.weight_by_documents:
        keys["weighted_sampler_alpha"] = config.data.weight_alpha
    return keys | {"log_interval": config.log.every}


def _refused(path: str, settings: Mapping[str, Any]) -> CheckpointError:
    return CheckpointError(f"{path}: NeoX cannot hold {_assignments(settings)}; --to native keeps everything")


def _assignments(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def _padded(rows: int, multiple: int) -> int:
    return -(-rows // multiple) * multiple
