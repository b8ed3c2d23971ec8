"""Read checkpoints of GPT models that Megatron-DeepSpeed (the BigScience fork) wrote in DeepSpeed's pipeline layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from castalia.checkpoint.formats.deepspeed.assemble import (
    adam_states,
    layout,
    masters_apart,
    progress,
    weight_dtype,
    whole,
)
from castalia.checkpoint.formats.deepspeed.folder import (
    BUFFERS,
    ScannedFolder,
    is_megatron,
    optimizer_ranks,
    optimizer_settings,
    scan,
    weights,
)
from castalia.checkpoint.formats.neox.architecture import RankTensors, compare, merge, observed
from castalia.checkpoint.formats.neox.names import MEGATRON, megatron_qkv, table
from castalia.checkpoint.neox_defects import summed_micro_batches
from castalia.checkpoint.rules import to_ours
from castalia.checkpoint.tensors import Checkpoint, GuessNote
from castalia.config.load import load_config
from castalia.config.schema import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TokenizerConfig,
    TrainConfig,
)
from castalia.errors import CheckpointError

POSITIONS = {1: "rotary", 2: "learned", 3: "alibi"}  # of megatron.enums.PositionEmbeddingType
# `glu_activation` -> ours
GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "liglu": "identity"}


def detect(path: Path) -> bool:
    """Whether a folder has the layer files of Megatron-DeepSpeed."""
    return is_megatron(path)


def read(
    path: str | Path, config: str | Path | None = None, tokenizer: str | None = None, tolerant: bool = False
) -> Checkpoint:
    """Open a step's folder; no tensor is read. `config`, `tokenizer`: used instead of what the files say.

    Raises CheckpointError for missing and damaged files, for models that ours cannot be, and for a config of another
    model; with `tolerant` the differences are in `facts.disagreements` instead.
    """
    folder = scan(Path(path))
    held = weights(folder)
    given = load_config(config) if config else None
    settings = observed(held, MEGATRON, folder, given.model if given else None) | _from_arguments(folder, held)
    model = merge(given.model if given else None, settings, {})
    other = given.model if given else None
    disagreements = compare(other, model, folder, MEGATRON, str(config), tolerant)
    # Layer files alone do not say; 3 is what today's program writes.
    version = float(folder.first.get("checkpoint_version", 0 if folder.states else 3))
    rules = table(MEGATRON, model, folder.tp, megatron_qkv(model, folder.tp, version))
    ranks = optimizer_ranks(folder, held, MEGATRON.embedding, model.tie_embeddings)
    run = given or _training(folder, model)
    run = run.with_({"model": model} | ({"tokenizer": TokenizerConfig(path=tokenizer)} if tokenizer else {}))
    dtype = weight_dtype(held)
    reached = progress(folder, run, fp16=dtype == "float16")
    step = folder.step - int(folder.first.get("skipped_steps") or 0)  # Adam's, where it is not stored
    changed, changed_note = masters_apart(held, ranks)
    notes = [changed_note] if changed_note else []
    if not folder.states:
        notes.append(GuessNote("there is no mp_rank_* file: activation, version and step are guesses"))
    state_notes = [] if ranks else ["there is no optimizer state: the weights can be trained on, but not resumed"]
    return Checkpoint(
        path=str(path),
        format="megatron-deepspeed",
        model=to_ours(rules, held, "weight", BUFFERS),
        optimizer=adam_states(rules, ranks, step, BUFFERS),
        progress=replace(reached, schedule=_in_steps(reached.schedule, folder.args)),
        config=run,
        notes=tuple(notes),
        state_notes=tuple(state_notes),
        facts=replace(
            layout(folder),
            masters_apart=changed,
            disagreements=disagreements,
            other_model=other if disagreements else None,
            other_source=str(config),
        ),
        summed_micro_batches=summed_micro_batches(folder.version, bool(folder.layers), run, folder.dp or 1),
    )


def _training(folder: ScannedFolder, model: ModelConfig) -> RunConfig:
    """The training run, as far as the stored arguments describe it. Raises CheckpointError for impossible ones."""
    args: Mapping[str, Any] = folder.args
    adam = {"eps": args.get("adam_eps"), "weight_decay": args.get("weight_decay"), "clip_grad": args.get("clip_grad")}
    adam["betas"] = tuple(args[key] for key in ("adam_beta1", "adam_beta2") if key in args) or None
    optimizer: dict[str, Any] = {"lr": args.get("lr")} | adam | optimizer_settings(folder)
    norm = optimizer.pop("clip_grad")
    clip = {} if norm is None else {"clip_norm": norm or None}  # 0: no clipping
    schedule = {"style": args.get("lr_decay_style"), "decay_steps": args.get("lr_decay_iters")}
    schedule |= {"min_lr": args.get("min_lr"), "warmup": args.get("lr_warmup_fraction")}
    schedule["warmup_steps"] = args.get("lr_warmup_iters") or None
    train = {"steps": args.get("train_iters"), "batch_size": args.get("global_batch_size")}
    train["micro_batch_size"] = args.get("micro_batch_size")
    if args.get("lr_warmup_iters") == 0 and schedule["warmup"] is None:
        schedule["warmup"] = 0.0
    length = args.get("seq_length") or model.max_positions or 2048
    compute = "bf16" if args.get("bf16") else "fp16" if args.get("fp16") else "fp32"
    try:
        return RunConfig(
            data=DataConfig(seq_length=length, holdout="contiguous", shuffled_passes=None),
            optimizer=OptimizerConfig(**_given(optimizer), **clip),
            schedule=ScheduleConfig(**_given(schedule)),
            train=TrainConfig(**_given(train)),
            precision={"compute": compute} if args else {},
            **_given({"seed": args.get("seed")}),
        )
    except ValidationError as error:
        raise CheckpointError(f"{folder.path}: its stored arguments do not describe a possible run: {error}") from error


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _in_steps(stored: Mapping[str, Any] | None, args: Mapping[str, Any]) -> dict[str, object] | None:
    """The state of Megatron's learning-rate schedule, which counts samples, in steps and by NeoX's names."""
    names = {"start_lr": "max_lr", "warmup_iter": "warmup_steps", "num_iters": "num_steps", "end_iter": "decay_steps"}
    batch = args.get("global_batch_size")
    if not stored or not batch or not {*names.values(), "decay_style", "min_lr"} <= stored.keys():
        return None
    values = {ours: stored[theirs] for ours, theirs in names.items()}
    steps = {name: whole(values[name] / batch) for name in names if name != "start_lr"}
    return {**values, **steps, "decay_style": stored["decay_style"], "min_lr": stored["min_lr"]}


def _from_arguments(folder: ScannedFolder, held: RankTensors) -> dict[str, Any]:
    """Settings that only the stored arguments show. Raises CheckpointError for models that ours cannot be."""
    args: Mapping[str, Any] = folder.args
    if args.get("apply_residual_connection_post_layernorm"):
        raise CheckpointError(f"{folder.path}: residual connections after the norm are not supported")
    if any("word_embeddings.norm." in name for name in held):
        raise CheckpointError(
            f"{folder.path}: the model has a norm after its embedding (BLOOM), which is not supported"
        )
    settings: dict[str, Any] = {"parallel_residual": False, "norm_eps": args.get("layernorm_epsilon", 1e-5)}
    kind = args.get("position_embedding_type")
    if kind is not None and f"{MEGATRON.embedding}.position_embeddings.weight" not in held:
        settings["position"] = POSITIONS.get(kind.value, "rotary")
    gated = args.get("glu_activation")
    # Megatron's fused GELU is the tanh approximation.
    fused = not args or args.get("bias_gelu_fusion") or args.get("openai_gelu")
    settings["activation"] = GATED[gated] if gated else "gelu_tanh" if fused else "gelu"
    for ours in ("attention_dropout", "hidden_dropout"):
        settings[ours] = args.get(ours) or 0.0
    if logical := (folder.first.get("checkpoint_info") or {}).get("original_vocab_size"):
        settings["vocab_size"] = logical
    return settings
