"""Read GPT-NeoX's checkpoints of every era, with and without pipeline files, of any number of ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from castalia.checkpoint.formats.deepspeed.assemble import adam_states, layout, masters_apart, progress, weight_dtype
from castalia.checkpoint.formats.deepspeed.folder import (
    BUFFERS,
    LAYER,
    RANK_STATE,
    SHARD,
    STATE,
    ScannedFolder,
    is_megatron,
    names_of,
    optimizer_ranks,
    round_robin,
    scan,
    stage3_weights,
    universal_state,
    weights,
)
from castalia.checkpoint.formats.neox.architecture import (
    RankTensors,
    compare,
    config_files,
    merge,
    observed,
)
from castalia.checkpoint.formats.neox.names import HEAD, LEGACY, W123, GqaRows, Names, neox_qkv, table
from castalia.checkpoint.neox_defects import summed_micro_batches
from castalia.checkpoint.rules import to_ours
from castalia.checkpoint.tensors import Checkpoint, GuessNote
from castalia.checkpoint.zero import RankState
from castalia.config.load import load_config
from castalia.config.schema import DataConfig, ModelConfig, RunConfig, TokenizerConfig
from castalia.errors import CheckpointError

ERAS: dict[str, Names] = {"head": HEAD, "w1-w3": W123, "v2": LEGACY, "v1": LEGACY}
OVER_THE_BATCH = (
    "GPT-NeoX mixes RWKV layers over the rows of a micro-batch; here they mix the tokens of each sequence, as meant. "
    "To train on as there: neox_exact=true"
)
# The version of DeepSpeed with which NeoX changed grouped queries and RMSNorm, without a mark in its files.
FIRST_WITH_NEW_ROWS = (0, 16)


def detect(path: Path) -> bool:
    """Whether a folder has DeepSpeed's files, and not those of Megatron-DeepSpeed."""
    kinds = (LAYER, STATE, RANK_STATE, SHARD)
    has_files = any(pattern.fullmatch(name) for name in names_of(path) for pattern in kinds)
    return has_files and not is_megatron(path)


def read(
    path: str | Path,
    config: str | Path | None = None,
    tokenizer: str | None = None,
    gqa_rows: GqaRows | None = None,
    rms_eps: Literal["inside", "outside"] | None = None,
    tolerant: bool = False,
) -> Checkpoint:
    """Open a step's folder. A few values are compared with their masters; no tensor is read as a whole.

    `config`, `tokenizer`: used instead of the training config in the folder, and of the tokenizer that it names.
    `gqa_rows`, `rms_eps`: the order of the rows of grouped queries, and whether RMSNorm's epsilon is inside the root.
    The files say neither; without these hints both are guessed from DeepSpeed's version, with a note.
    Raises CheckpointError for missing and damaged files, and for a config of another model; with `tolerant` the
    differences are in `facts.disagreements` instead.
    """
    # What is stored: weights by `position.name` (ZeRO 3 has only masters), and the config if it lies with them.
    folder = scan(Path(path))
    run = _config(folder, config)
    ranks: list[RankState] | None = None
    if folder.stage3:
        ranks = optimizer_ranks(folder, {}, HEAD.embedding, tied=False)
        if ranks is None:
            raise CheckpointError(f"{folder.path}: ZeRO 3 keeps the weights in the optimizer files, which are missing")
        held = stage3_weights(folder, ranks[0])
    else:
        held = weights(folder)
    # What the model is: tensors before the config, the config before guesses.
    era = _era(folder, held)
    settings = observed(held, ERAS[era], folder, run.model if run else None)
    given = run.model if run else None
    guesses = {} if given else {name: value for name, value in _guesses(settings).items() if name not in settings}
    if not given and settings["tie_embeddings"] and not folder.listed:  # the head's file may be missing
        guesses["tie_embeddings"] = True
    model = merge(given, settings, guesses)
    source = str(config or ", ".join(file.name for file in config_files(folder.path)))
    disagreements = compare(given, model, folder, ERAS[era], source, tolerant)
    # What the files do not say: hints, or a guess from DeepSpeed's version.
    model, epsilon_note = _place_epsilon(folder, era, model, run, rms_eps)
    rows, rows_note = _rows(folder, era, model, gqa_rows)
    # From NeoX's tensors to ours; norms that a shared one replaces are stored, but never used.
    rules = table(ERAS[era], model, folder.tp, neox_qkv(model, folder.tp, rows))
    ignore = BUFFERS + (r"|\.post_attention_layernorm\." if model.has_one_norm else "")
    optimizer_note = ""
    if ranks is None:
        try:
            ranks, optimizer_note = _optimizer(folder, held, model)
        except CheckpointError as error:
            if not disagreements:
                raise
            optimizer_note = f"the optimizer state is not read: {error}"  # `inspect` still shows what else is wrong
    summed, summed_note = _summed_ranks(folder, model)
    changes = {"model": model} | ({"tokenizer": TokenizerConfig(path=tokenizer)} if tokenizer else {})
    run = (run or RunConfig(data=_data(folder))).with_(changes)
    dtype = weight_dtype(held)
    stored_steps = ranks is not None and all(step is not None for rank in ranks for step in rank.step.values())
    changed, changed_note = masters_apart(held, ranks)
    over_note = OVER_THE_BATCH if "rwkv" in model.layer_kinds and not (run.neox_exact or model.rwkv_over) else ""
    notes = (_guess_note(guesses) if guesses else "", over_note, epsilon_note, rows_note, changed_note)
    return Checkpoint(
        path=str(path),
        format="neox",
        model=to_ours(rules, held, "weight", ignore),
        optimizer=adam_states(rules, ranks, _unstored_step(folder), ignore),
        progress=progress(folder, run, fp16=dtype == "float16"),
        config=run,
        notes=tuple(note for note in notes if note),
        state_notes=tuple(note for note in (optimizer_note, summed_note) if note),
        facts=replace(
            layout(folder),
            era=era,
            gqa_rows=rows,
            adam_steps_stored=stored_steps,
            guesses=tuple(guesses),
            masters_apart=changed,
            disagreements=disagreements,
            other_model=given if disagreements else None,
            other_source=source,
        ),
        release="v1" if era == "v1" else "head",
        summed_bias_ranks=summed,
        # The first release computes norms for clipping on the first tensor rank and stage alone.
        norm_ranks=(folder.tp, folder.pp) if era == "v1" and dtype == "float16" and not folder.shards else (1, 1),
        summed_micro_batches=summed_micro_batches(folder.version, bool(folder.layers), run, folder.dp or 1),
    )


def _config(folder: ScannedFolder, given: str | Path | None) -> RunConfig | None:
    files = [given] if given else config_files(folder.path)
    return load_config(files) if files else None


def _era(folder: ScannedFolder, held: RankTensors) -> str:
    """A key of `ERAS`, by the names of the MLP's matrices and whether DeepSpeed's version is stored."""
    if any(name.endswith(".mlp.w1.weight") for name in held):
        return "w1-w3"
    if not any(name.endswith(".mlp.dense_h_to_4h.weight") for name in held):
        return "head"
    return "v2" if folder.version else "v1"


def _guess_note(guesses: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{name}={value}" for name, value in guesses.items())
    return GuessNote(f"no training config lies with the files, so {listed} are guesses; give the config with --config")


def _guesses(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that neither tensors nor a config show, as the well-known models of this architecture have them."""
    if settings["gated_mlp"] or settings["norm"] == "rmsnorm":
        return {"activation": "silu", "parallel_residual": False, "norm_eps": 1e-5, "rotary_pct": 1.0}
    if settings["position"] == "learned":
        return {"activation": "gelu_tanh", "parallel_residual": False, "norm_eps": 1e-5}
    return {"activation": "gelu_tanh", "parallel_residual": True, "norm_eps": 1e-5, "rotary_pct": 0.25}


def _data(folder: ScannedFolder) -> DataConfig:
    longest = folder.args.get("max_position_embeddings")
    length = {"seq_length": longest} if longest else {}
    return DataConfig(holdout="contiguous", shuffled_passes=None, **length)  # as its program reads any corpus


def _is_recent(folder: ScannedFolder, era: str) -> bool:
    numbers = [int(number) for number in re.findall(r"\d+", folder.version or "0")[:2]]
    return era == "head" and tuple(numbers) >= FIRST_WITH_NEW_ROWS


def _place_epsilon(
    folder: ScannedFolder, era: str, model: ModelConfig, run: RunConfig | None, hint: str | None
) -> tuple[ModelConfig, str]:
    """The model with RMSNorm's epsilon in the place that it had in training, and a note if that is a guess."""
    if model.norm != "rmsnorm" or (hint is None and run and "model.rms_eps_inside" in run.origins):
        return model, ""
    inside = hint == "inside" if hint else _is_recent(folder, era)
    place = "inside" if inside else "outside"
    note = f"RMSNorm's epsilon is taken to stand {place} the root, judging by DeepSpeed {folder.version}: the files do "
    note += f"not say; --rms-eps {'outside' if inside else 'inside'} reads it the other way"
    return model.with_({"rms_eps_inside": inside}), "" if hint else GuessNote(note)


def _rows(folder: ScannedFolder, era: str, model: ModelConfig, hint: GqaRows | None) -> tuple[GqaRows, str]:
    """The order of the rows of grouped queries, and a note if that is a guess."""
    if model.kv_heads == model.num_heads:
        return "new", ""
    rows: GqaRows = hint or ("new" if _is_recent(folder, era) else "old")
    note = f"grouped queries are taken to be in the {rows} row order, judging by DeepSpeed {folder.version}: the files "
    note += f"do not say; --gqa-rows {'old' if rows == 'new' else 'new'} reads them the other way"
    return rows, "" if hint else GuessNote(note)


def _optimizer(folder: ScannedFolder, held: RankTensors, model: ModelConfig) -> tuple[list[RankState] | None, str]:
    """The optimizer state of each tensor rank, and a note about it."""
    if round_robin(folder):
        return None, "the optimizer state was written with round_robin_gradients, which nothing undoes: it is left out"
    ranks = universal_state(folder, held, HEAD.embedding) or optimizer_ranks(
        folder, held, HEAD.embedding, model.tie_embeddings
    )
    if ranks is None:
        return None, "there is no optimizer state: the weights can be used and trained on, but not resumed exactly"
    if any(step is None for rank in ranks for step in rank.step.values()):
        return ranks, (
            f"Adam's step is not stored; {_unstored_step(folder)} is taken, from the iteration. NeoX starts again "
            "at 1, which changes the run"
        )
    if any(step == _unstored_step(folder) + 1 for rank in ranks for step in rank.step.values()):
        return ranks, "Adam's step is one more than the updates: DeepSpeed counts its initialisation, and continues so"
    return ranks, ""


def _unstored_step(folder: ScannedFolder) -> int:
    """Adam's step where it is not stored: the number of updates."""
    return folder.step - int(folder.first.get("skipped_steps") or 0)


def _summed_ranks(folder: ScannedFolder, model: ModelConfig) -> tuple[int, str]:
    if folder.tp == 1 or not model.parallel_residual or not (model.attention_bias or model.mlp_bias):
        return 1, ""
    return folder.tp, (
        f"attn.out.bias and mlp.down.bias are the sums over {folder.tp} tensor ranks, as NeoX computes with "
        f"parallel residuals; there they learn {folder.tp} times as fast as any other parameter"
    )
