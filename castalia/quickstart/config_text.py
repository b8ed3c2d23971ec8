"""The config of a quick start: each value with its reason, and as YAML that a person can read, edit and run again."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from castalia.config.load import load_config
from castalia.config.schema import RunConfig
from castalia.config.yaml_files import to_yaml
from castalia.quickstart.choose import Choice
from castalia.quickstart.family import architecture, rate_groups
from castalia.quickstart.measured import BASE_WIDTH, SOURCE

SAVE_SECONDS = 600.0  # from one checkpoint to the next
EVALUATIONS = 10  # in a run
EVALUATED_SHARE = 0.15  # of the tokens trained on: all evaluations, which cost a third of training each
WARMUP = 0.05
COLUMN, WIDTH = 34, 100  # of the comments, and of the lines

Settings = dict[str, tuple[Any, str]]  # dotted path of a key -> its value and why


class Places(NamedTuple):
    """Where things lie: the run's folder, the tokenizer's file and the prefixes of two corpora."""

    run: str
    tokenizer: str
    train: str
    valid: str


def settings(choice: Choice, places: Places, valid_tokens: int, steps: int, step_seconds: float) -> Settings:
    """All that the config says. `steps` and `step_seconds` are of the whole run and of one step, as measured."""
    batch_tokens = choice.batch_size * choice.length
    evaluated = max(1, min(valid_tokens // batch_tokens, int(EVALUATED_SHARE * steps / EVALUATIONS)))
    model = architecture(choice.layers, choice.width, choice.vocab_size, choice.length)
    del model["vocab_size"], model["max_positions"]  # the tokenizer's, and data.seq_length
    reasons = {
        "num_layers": "blocks one after the other",
        "hidden_size": "numbers that stand for a token between the blocks",
        "num_heads": f"of {choice.width // model['num_heads']} numbers each",
        "mlp_size": "8/3 of hidden_size, a multiple of 64",
        "norm": "from here on Llama's architecture: other programs can read it",
    }
    found: Settings = {f"model.{name}": (value, reasons.get(name, "")) for name, value in model.items()}
    rate = f"of vectors; for batch, width and depth from one measured rate: {SOURCE}"
    return found | {
        "data.train": (places.train, "the text as tokens"),
        "data.valid": (places.valid, "text that the model never learns from: it judges it"),
        "data.seq_length": (choice.length, "tokens that the model sees at once"),
        "tokenizer.path": (places.tokenizer, "learned from the text"),
        "optimizer.lr": (choice.rate, rate),
        "optimizer.groups": (rate_groups(choice.width), f"muP: matrices learn at {BASE_WIDTH} / width of that rate"),
        "optimizer.betas": ([0.9, 0.95], ""),
        "optimizer.weight_decay": (0.1, ""),
        "schedule.style": ("linear", "from the full rate down to nothing at the last step"),
        "schedule.warmup": (WARMUP, "share of the steps in which the rate rises"),
        "train.steps": (steps, f"what fits into the time at {step_seconds:.3g} s a step; more time: raise it"),
        "train.batch_size": (choice.batch_size, f"sequences of a step: {batch_tokens:,} tokens"),
        "train.micro_batch_size": (choice.micro_batch_size, "sequences at once: lower it where memory is short"),
        "eval.every": (max(1, steps // EVALUATIONS), "steps between looks at text that it never learns from"),
        "eval.batches": (evaluated, ""),
        "checkpoint.dir": (places.run, "the run's folder"),
        "checkpoint.every": (max(1, min(steps, round(SAVE_SECONDS / step_seconds))), "steps: about ten minutes"),
        "checkpoint.keep_last": (2, "older ones are deleted"),
        "log.every": (max(1, min(steps // 20, round(60 / step_seconds))), "steps between lines on the screen"),
    }


def load(values: Settings, words: Sequence[str]) -> RunConfig:
    """The config that the settings and the user's `key=value` words make."""
    return load_config([nested(values)], words)


def overridden(values: Settings, config: RunConfig) -> Settings:
    """The settings with what the user's words changed or added in `config`, and without what they replaced."""
    found = {path: entry for path, entry in values.items() if path in config.origins}
    for path, origin in config.origins.items():
        if origin.startswith("command line"):
            found[path] = (_value(config, path), "as you asked")
    return found


def nested(values: Settings) -> dict[str, Any]:
    """The settings as nested mappings, as a YAML file has them, without the reasons."""
    tree: dict[str, Any] = {}
    for path, (value, _) in values.items():
        *parents, name = path.split(".")
        level = tree
        for parent in parents:
            level = level.setdefault(parent, {})
        level[name] = value
    return tree


def commented(values: Settings, head: Sequence[str]) -> str:
    """YAML in which each value has its reason beside it; lines of `head` come first, as comments."""
    lines = [f"# {line}".rstrip() for line in head]
    return "\n".join([*lines, *_rows(nested(values), values, "")]) + "\n"


def _rows(tree: dict[str, Any], values: Settings, prefix: str) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for name, node in tree.items():
        path = prefix + name
        if path not in values:
            yield from ([""] if not prefix else [])
            yield f"{indent}{name}:"
            yield from _rows(node, values, path + ".")
            continue
        # JSON is YAML on one line. Scalars are quoted as YAML needs it: the slice drops `_: `.
        text = json.dumps(node) if isinstance(node, list | dict) else to_yaml({"_": node})[3:].strip()
        why = values[path][1]
        line = f"{indent}{name}: {text}"
        if why and len(line) < COLUMN and COLUMN + len(why) < WIDTH:
            yield f"{line:<{COLUMN}}  # {why}"
        else:
            yield from (f"{indent}# {part}" for part in textwrap.wrap(why, WIDTH))
            yield line


def _value(config: RunConfig, path: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for name in path.split("."):
        value = value[name] if isinstance(value, Mapping) else None
    return value
