"""What `castalia config explain KEY` says: what a key does, when one changes it, an example, and GPT-NeoX's name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from castalia.config.fields import FIELDS, SECTIONS, describe, describe_field, section_in
from castalia.config.neox.keys import FORMER, KEYS
from castalia.wrapping import aligned

# When one changes a key, and to what for example. Keys that are missing here say enough by their description.
WHEN = {
    "seed": ("for another random beginning and another order of the data, to see how much results vary", "1"),
    "model.vocab_size": ("seldom: without it the tokenizer's size is taken", "50257"),
    "model.pattern": ("for blocks without attention, or a mix of kinds: docs/layer-kinds.md", "[attention, gmlp]"),
    "model.mup": ("to use learning rates tuned on a narrow model on a wide one: docs/scaling.md", "{base_width: 256}"),
    "data.path": ("for each corpus; its name is what `castalia data prepare` printed", "data/kjv_text_document"),
    "data.train": ("for several corpora, for labels, or for pairs", "[{path: data/a, weight: 2}, {path: data/b}]"),
    "data.valid": ("to evaluate on texts of their own instead of a part of data.path", "data/held_out"),
    "data.seq_length": ("for longer context; memory and time grow with it", "1024"),
    "data.split": ("to keep more, less or nothing for validation", "98, 2, 0"),
    "data.holdout": ("seldom: contiguous holds out what GPT-NeoX and Megatron would", "contiguous"),
    "data.packing": ("for fine-tuning, where a sequence should not hold parts of several documents", "unpacked"),
    "data.shuffled_passes": ("seldom: null keeps GPT-NeoX's order in a run of more passes", "null"),
    "tokenizer.path": ("to name the tokenizer that the corpus was prepared with", "tokenizer.json"),
    "optimizer.lr": ("first of all settings: `castalia lr-find CONFIG` suggests one; wider models need less", "6e-4"),
    "optimizer.weight_decay": ("for more or less regularisation; 0 where a model is fine-tuned", "0.1"),
    "optimizer.clip_norm": ("where a bad batch makes the loss jump: lower", "0.5"),
    "schedule.warmup": ("where the loss jumps in the first steps: larger", "0.05"),
    "schedule.decay_steps": ("where a run will be continued beyond its steps", "20000"),
    "schedule.min_lr": ("to end at a tenth of the peak, as most language models do, instead of 0", "3e-5"),
    "train.steps": ("for a longer or shorter run; the learning rate decays over them", "2000"),
    "train.epochs": ("to give the length of a run in passes over its data", "3"),
    "train.max_hours": ("where a run has to end in time, saved", "8.5"),
    "train.batch_size": ("for smoother gradients (larger) or more updates for the same data (smaller)", "64"),
    "train.micro_batch_size": ("where memory is short (smaller) or the device is not busy (larger)", "4"),
    "train.recompute": (
        "where memory is short: full computes a third more and keeps far fewer activations, auto only where it must",
        "auto",
    ),
    "train.compile": ("to wait for compiling once and save time in every step", "true"),
    "train.deterministic": ("where a repeated step must give the same bits on a GPU", "true"),
    "precision.compute": (
        "where `auto` is not what you want: fp32 to look for errors, fp16 on old GPUs, fp8 on Hopper and newer",
        "bf16",
    ),
    "parallel.tp": ("where a layer does not fit on one device", "2"),
    "parallel.pp": ("where the model does not fit on the devices of one machine", "4"),
    "parallel.zero": ("where weights or moments do not fit: 1, then 2, then 3", "1"),
    "eval.every": ("to see more or less often how held-out text fares", "200"),
    "checkpoint.dir": ("for each run: it holds all that the run writes", "runs/second"),
    "checkpoint.every": ("to keep states of known steps, beside those that are saved by time", "500"),
    "checkpoint.keep_last": ("where the disk is small", "2"),
    "checkpoint.init_from": ("to begin a new run with the weights of another one", "runs/first"),
    "checkpoint.resume": ("to go on with a run that lies in another folder", "runs/first"),
    "finetune.lora": ("to train small adapters instead of all weights", "{rank: 16}"),
    "watch.policy": ("where a spike should not be learned from: skip, rewind or stop", "skip"),
    "log.every": ("for more or fewer lines on the terminal; metrics.jsonl has every step", "1"),
}


def facts_about(key: str | None = None) -> dict[str, list[dict[str, Any]]]:
    """What `explanation` says as values: of our keys, and of GPT-NeoX's. None: of all keys; an unknown one has none."""
    if key is None:
        ours, names = [*FIELDS, *SECTIONS], [*KEYS, *FORMER]
    else:
        name = key.replace("-", "_")
        names = [name] if name in KEYS or name in FORMER else []
        ours = list(dict.fromkeys([*([key] if key in FIELDS or key in SECTIONS else []), *_targets(name)]))
    return {"keys": [_facts(path) for path in ours], "neox": [_neox_facts(name) for name in names]}


def _neox_facts(name: str) -> dict[str, Any]:
    row = KEYS.get(name) or FORMER[name]
    default = row.default if name in KEYS else None
    return {"key": name, "default": default, "former": name not in KEYS, "kind": row.kind, "target": row.target}


def _facts(key: str) -> dict[str, Any]:
    when, value = WHEN.get(key, ("", _another_value(key)))
    return {
        "key": key,
        "description": describe(key),
        "change_it": when or None,
        "holds": list(_elements(key)),
        "example": f"{key}={value}" if value else None,
        "neox": neox_names(key),
    }


def explanation(key: str) -> Iterator[str]:
    """Lines about a key of ours, of GPT-NeoX's, or of both, if both have the name. None for unknown ones."""
    name = key.replace("-", "_")  # GPT-NeoX's files use either
    row = KEYS.get(name) or FORMER.get(name)
    if key in FIELDS or key in SECTIONS:
        yield from _ours(key)
    if row is None:
        return
    verbs = {"idle": "no effect here: ", "refused": "refused unless it is off: ", "renamed": "now "}
    since = f"default {row.default}" if name in KEYS else "formerly"
    yield f"{name} (GPT-NeoX, {since}): {verbs.get(row.kind, 'becomes ')}{row.target}"
    for path in _targets(name):
        yield from _ours(path)


def _ours(key: str) -> Iterator[str]:
    facts = _facts(key)
    yield f"{key}: {describe(key)}"
    rows = [("change it", facts["change_it"])] if facts["change_it"] else []
    rows += [("holds" if number == 0 else "", text) for number, text in enumerate(facts["holds"])]
    rows += [("example", f"castalia train run.yml {_quoted(facts['example'])}")] if facts["example"] else []
    rows.append(("GPT-NeoX", ", ".join(facts["neox"]) or "has no such key"))
    yield from aligned(rows)


def _quoted(word: str) -> str:
    return f"'{word}'" if re.search(r"[\s{}\[\]]", word) else word


def _elements(key: str) -> Iterator[str]:
    """The keys of a list's entries, or those of an optional section."""
    if key in SECTIONS:
        below = {path: info for path, info in FIELDS.items() if path.rpartition(".")[0] == key}
        yield from (f"{path.rpartition('.')[2]}: {describe_field(info)}" for path, info in below.items())
    elif entry := section_in(FIELDS[key].annotation):
        yield from (f"{inner}: {describe_field(info)}" for inner, info in entry.model_fields.items())


def _another_value(key: str) -> str:
    """A value that a plain key may have: the other one of two, the next of several, or its default."""
    info = FIELDS.get(key)
    if info is None:
        return ""
    if isinstance(info.default, bool):
        return str(not info.default).lower()
    choices = _choices(info.annotation)
    others = [choice for choice in choices if choice != info.default]
    if others:
        return str(others[0])
    return str(info.default) if isinstance(info.default, int | float) else ""


def _choices(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for each in get_args(annotation) if get_origin(each) is Literal for choice in get_args(each)]


def neox_names(key: str) -> list[str]:
    """The arguments of GPT-NeoX that become this key, or a key below it."""
    return [name for name, row in KEYS.items() if row.kind in ("to", "joint") and _mentions(row.target, key)]


def _mentions(target: str, key: str) -> bool:
    """Whether a row's target (`data.seq_length_warmup.start, steps`) names the key or is below it."""
    return re.search(rf"(?<![\w.]){re.escape(key)}(?![\w])", target) is not None


def _targets(name: str) -> list[str]:
    """Our keys that a plain argument of GPT-NeoX becomes."""
    row = KEYS.get(name)
    return [path for path in row.target.split(", ") if path in FIELDS or path in SECTIONS] if row else []
