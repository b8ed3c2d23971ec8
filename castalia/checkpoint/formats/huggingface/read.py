"""Read Hugging Face folders of the model types in `names.py`: weights in safetensors or `.bin` files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from castalia.checkpoint.architecture_check import unrounded
from castalia.checkpoint.formats.huggingface import trainer
from castalia.checkpoint.formats.huggingface.config_json import (
    ConfigJson,
    model_of,
    read_config,
    settings,
    spelled_out,
)
from castalia.checkpoint.formats.huggingface.model_type import CLASSIFIER, SCORE, Family
from castalia.checkpoint.formats.huggingface.names import state_table, table
from castalia.checkpoint.neox_defects import INHERITED_TYPES, take_inherited
from castalia.checkpoint.rules import STATE_ROLES, to_ours
from castalia.checkpoint.sampled_values import fingerprint
from castalia.checkpoint.tensors import AdamState, Checkpoint, CheckpointFacts, Progress
from castalia.config.schema import DataConfig, ModelConfig, RunConfig, TokenizerConfig
from castalia.errors import CheckpointError
from castalia.reading import keys, read_json, short, typed
from castalia.storage.extent import FileTensor
from castalia.storage.lazy import TensorRef
from castalia.storage.safetensors import open_safetensors, safe_join
from castalia.storage.torch_file import open_pt

CONFIG = "config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # each may be an index of shards instead: + ".index.json"
OPTIMIZER_FILES = ("optimizer.safetensors",)
BESIDE = "castalia.json"  # what our conversions add: optimizer steps, progress, the run's config
BLOCK = re.compile(r"(?:h|layers)\.(\d+)\.")
# Derived tensors that older versions of transformers stored.
OLD_BUFFERS = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$|(^|\.)rotary_emb\.inv_freq$")

NOTED = keys(  # of castalia.json
    {
        "progress": dict[str, Any] | None,
        "optimizer_steps": dict[str, int] | None,
        "fingerprint": str | None,
        "config": dict[str, Any] | None,
        **INHERITED_TYPES,
    }
)


def detect(path: Path) -> bool:
    """Whether a folder has a config.json as transformers writes it, with or without weights."""
    return (path / CONFIG).is_file() and bool(read_table(path / CONFIG).keys() & {"model_type", "architectures"})


def has_weights(path: Path, names: Sequence[str] = WEIGHT_FILES) -> bool:
    """Whether a folder has one of these files, or the index of its shards."""
    return any((path / name).is_file() or (path / f"{name}.index.json").is_file() for name in names)


def read(path: Path, tokenizer: str | None = None) -> Checkpoint:
    """Open a folder. Only config.json, the headers of weight files and a few sampled values are read.

    `tokenizer`: used instead of the one in the folder. Raises CheckpointError for models that ours cannot be, for
    missing or damaged files, and for tensors that are not those of config.json.
    """
    config = read_config(path / CONFIG)
    family = config.family
    tensors = _open_weights(path)
    # One tensor for each name, since the format has no ranks.
    named = _by_rank(tensors, family)
    model, tie_note = _tied_as_transformers_does(_with_reward_head(config, named), family, named)
    further_note = _without_further_blocks(config, model.num_layers, named)
    _check_blocks(path, named, model.num_layers)
    extras, extras_note = _extras(path, tensors)
    ours = to_ours(table(family, model), named, ignore=OLD_BUFFERS.pattern)
    trained = trainer.read_run(path)
    run = _run_config(path, config, model, extras, tokenizer).with_({} if extras.get("config") else trained.settings)
    noted = typed(extras.get("progress") or {}, f"{path / BESIDE}: progress", CheckpointError, Progress)
    reached = trained.progress
    # Our own notes know more of the same step, unless a Trainer went on from there.
    progress, inherited = take_inherited(
        noted if reached is None or noted.step == reached.step else reached, extras, run
    )
    state, state_note = _optimizer(path, extras, family, model, ours), ""
    if state is None:
        state, state_note = trainer.read_optimizer(path, family, model, ours)
    state_notes = [note for note in (extras_note, *trained.notes, state_note) if note]
    return Checkpoint(
        str(path),
        "huggingface",
        ours,
        state,
        progress,
        run,
        (*config.notes, *(note for note in (tie_note, further_note) if note)),
        tuple(state_notes),
        CheckpointFacts(model_type=config["model_type"]),
        **inherited,
    )


def _with_reward_head(config: ConfigJson, named: Mapping[str, list[TensorRef]]) -> ModelConfig:
    """The model that the class builds: a reward model where it gives one number. Raises CheckpointError for several."""
    model, classes = model_of(config), config["architectures"] or ()
    if SCORE not in named and not any(str(name).endswith(CLASSIFIER) for name in classes):
        return model
    if SCORE in named and named[SCORE][0].shape[0] != 1:
        raise config.refuse(
            f"{SCORE} has {named[SCORE][0].shape[0]} rows, so that this model sorts texts into classes; only reward "
            "models, with one row, are supported"
        )
    return model.with_({"reward_head": True})


def _without_further_blocks(config: ConfigJson, layers: int, named: dict[str, list[TensorRef]]) -> str:
    """A note on blocks behind the last that predict the tokens after the next, which are removed from `named`."""
    more = config["num_nextn_predict_layers"] or 0
    blocks = {name: int(found[1]) for name in named if (found := BLOCK.match(name))}
    further = [name for name, block in blocks.items() if layers <= block < layers + more]
    for name in further:
        del named[name]
    if not further:
        return ""
    return (
        f"num_nextn_predict_layers={more}: {len(further)} tensors of what predicts the tokens after the next are left "
        "out, as transformers does"
    )


def _tied_as_transformers_does(
    model: ModelConfig, family: Family, named: dict[str, list[TensorRef]]
) -> tuple[ModelConfig, str]:
    """The model with the head that transformers gives it, and a note where that is not what config.json says.

    A head that equals the embedding is removed from `named`. Source: `PreTrainedModel.tie_weights` of transformers 5,
    which uses a stored head that differs from the embedding, whatever the config says; older versions used the
    embedding. Of a tied model either of the two may be stored.
    """
    if not model.tie_embeddings or family.head not in named:
        return model, ""
    embedding = next(rule.theirs for rule in family.rules(model) if rule.ours == "embed.weight")
    if embedding not in named:  # only one of the two was stored, under the head's name
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


def _extras(path: Path, tensors: Mapping[str, TensorRef]) -> tuple[dict[str, Any], str]:
    """What a conversion of ours stored with the weights, and a note if some of it is missing or does not apply.

    If the weights have changed since, the optimizer state and the progress belong to other weights and are dropped.
    """
    if not (path / BESIDE).is_file():
        return {}, ""
    extras = read_table(path / BESIDE, NOTED)
    stateful, known = extras.get("optimizer_steps") is not None, extras.get("fingerprint")
    if stateful and not has_weights(path, OPTIMIZER_FILES):
        return extras | {"optimizer_steps": None}, (
            f"{OPTIMIZER_FILES[0]}, the optimizer state that {BESIDE} belongs to, is missing: the weights can be used "
            "and trained on, but not resumed"
        )
    if known is not None:
        changed = known != fingerprint(tensors)
    else:  # our first conversions stored no fingerprint: compare with the masters
        stored = _open_weights(path, OPTIMIZER_FILES) if stateful else {}
        masters = {name.removesuffix(".master"): ref for name, ref in stored.items() if name.endswith(".master")}
        changed = bool(unrounded(tensors, masters))
    if not changed:
        return extras, ""
    return {"config": extras.get("config")}, (
        f"the weights were changed after {BESIDE} and the optimizer state were written (by training elsewhere, say): "
        "the weights count; optimizer state, step and progress, which belong to the old ones, are left out"
    )


def _check_blocks(path: Path, names: Iterable[str], expected: int) -> None:
    """Raises CheckpointError if config.json describes fewer or more blocks than the weights have."""
    stored = len({block[1] for name in names if (block := BLOCK.match(name))})
    if stored != expected:
        raise CheckpointError(
            f"{path / CONFIG} describes {expected} blocks, the weights have {stored}: the two do not belong "
            "together, or one was changed; set the number of layers to what the weights have, or get both again"
        )


def _by_rank(tensors: Mapping[str, TensorRef], family: Family) -> dict[str, list[TensorRef]]:
    heads = {f"{module}.weight": family.head for module in family.head_modules}
    # Files of a model without its head lack the first part of the prefix, or all of it.
    inner = family.prefix.partition(".")[2]
    return {
        heads.get(name, name.removeprefix(family.prefix).removeprefix(inner)): [ref] for name, ref in tensors.items()
    }


def _optimizer(
    path: Path, extras: Mapping[str, Any], family: Family, model: ModelConfig, weights: Mapping[str, TensorRef]
) -> dict[str, AdamState] | None:
    """The optimizer state that a conversion of ours stored: tensors `name.role`, with the weights' names and rules."""
    steps = extras.get("optimizer_steps")
    if steps is None:
        return None
    tensors = _open_weights(path, OPTIMIZER_FILES)
    stored: dict[str, dict[str, TensorRef]] = {role: {} for role in STATE_ROLES}
    for name, ref in tensors.items():
        stem, _, role = name.rpartition(".")
        stored.setdefault(role, {})[stem] = ref
    ours: dict[str, Mapping[str, TensorRef]] = {"master": weights}
    for role in STATE_ROLES:
        if stored[role] or role != "master":  # fp32 weights are their own masters
            ours[role] = to_ours(state_table(family, model), _by_rank(stored[role], family), role)
    if unknown := sorted(steps.keys() - ours["exp_avg"].keys()):
        raise CheckpointError(f"{path / BESIDE}: optimizer_steps has {short(unknown[0])}, which no tensor is called")
    return {
        name: AdamState(
            master=ours["master"][name], exp_avg=ours["exp_avg"][name], exp_avg_sq=ours["exp_avg_sq"][name], step=step
        )
        for name, step in steps.items()
    }


def _run_config(
    path: Path, config: ConfigJson, model: ModelConfig, extras: Mapping[str, Any], tokenizer: str | None
) -> RunConfig:
    """The run that a conversion of ours stored, with the architecture of config.json; else the architecture alone."""
    tokenizer_config = TokenizerConfig(path=tokenizer) if tokenizer else own_tokenizer(path) or TokenizerConfig()
    if not extras.get("config"):
        return RunConfig(
            model=model, data=DataConfig(seq_length=min(model.max_positions or 2048, 2048)), tokenizer=tokenizer_config
        )
    run = typed(extras["config"], f"{path / BESIDE}: the config in it", CheckpointError, RunConfig)
    known = {name for name in settings(config) if not name.endswith("dropout")} | {"tie_embeddings", "reward_head"}
    if model.experts and run.model and run.model.experts:  # of which only the run's config has the rate of balancing
        model = model.with_({"experts.balance_rate": run.model.experts.balance_rate})
    if run.model is None or run.model.vocab_size is None or run.model.padded_vocab_size != model.vocab_size:
        known |= {"vocab_size", "vocab_multiple"}
    merged = model if run.model is None else run.model.with_({name: getattr(model, name) for name in known})
    if run.model is not None:
        before, after = (spelled_out(m, m.max_positions or run.data.seq_length) for m in (run.model, merged))
        merged = run.model if before == after else merged
    return run.with_({"model": merged} | ({"tokenizer": tokenizer_config} if tokenizer_config.path else {}))


def _open_weights(path: Path, names: Sequence[str] = WEIGHT_FILES) -> dict[str, TensorRef]:
    """All tensors by name, from the first of these files or from its shards. Raises CheckpointError without any."""
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
    """The tensors of a safetensors file or of a table that `torch.save` wrote, by name."""
    if path.suffix == ".safetensors":
        return dict(open_safetensors(path))
    loaded = open_pt(path)
    if not isinstance(loaded, dict) or not all(isinstance(ref, FileTensor) for ref in loaded.values()):
        raise CheckpointError(f"{path} does not hold a table of tensors")
    return loaded


def own_tokenizer(path: Path) -> TokenizerConfig | None:
    """The tokenizer whose files lie in a folder, or None."""
    # Any of these makes a tokenizer; which one is used, the tokenizer's loader decides.
    kinds = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
    has_files = any(all((path / name).is_file() for name in names) for names in kinds)
    return TokenizerConfig(path=str(path)) if has_files else None


def read_table(path: Path, shape: Any = dict[str, Any]) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError for other content, and for values of types not in `shape`."""
    return read_json(path, CheckpointError, shape)
