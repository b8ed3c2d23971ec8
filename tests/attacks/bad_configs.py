"""Configs that are wrong on purpose, made from the schema: type, range, spelling, nesting, missing keys, giants.

Each is one mistake, or several, in a config that is sound otherwise, as a YAML text.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from castalia.config.fields import FIELDS, SECTIONS

SOUND = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 64, "max_positions": 64},
    "data": {"path": "text", "seq_length": 16},
    "train": {"steps": 10, "batch_size": 4, "micro_batch_size": 2},
    "optimizer": {"lr": 0.001},
}
REQUIRED = ("model.num_layers", "model.hidden_size", "model.num_heads")
GIANTS = (2**32, 10**12, 10**15, 10**40, -(10**12))
CONTRADICTIONS = (
    {"model.hidden_size": 33}, {"model.num_kv_heads": 3}, {"parallel.tp": 3}, {"parallel.pp": 5},
    {"parallel.gpus": 3, "parallel.tp": 2}, {"schedule.min_lr": 1.0}, {"optimizer.betas": [0.9, 1.0]},
    {"data.seq_length": 128}, {"train.micro_batch_size": 3}, {"train.epochs": 2}, {"data.train": ["other"]},
    {"log.profile": {"start": 9, "stop": 3}}, {"data.packing": "unpacked"}, {"generate.mode": "input-file"},
    {"train.objective": "dpo"}, {"train.batch_size_warmup": {"start": 9, "steps": 2}},
    {"data.seq_length_warmup": {"start": 99, "steps": 2}}, {"model.mup": {}, "optimizer.name": "muon"},
    {"watch.policy": "rewind", "checkpoint.save_optimizer": False}, {"model.rotary_pct": 0.01},
    {"checkpoint.resume": "a", "checkpoint.init_from": "b"},
    {"model.vocab_size": 63, "model.vocab_multiple": 1, "parallel.tp": 2},
)  # fmt: skip
PATTERNS = ("(", "*", "[a", "a{2,1}", "(?P<x", "(?<=a)b", r"\1", "((a{1000}){1000}){1000}", "(" * 5000)


def _bomb(first: str, entry: str) -> str:
    """Thirty lines, each of which names the one before ten times."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} " + entry.format(", ".join([f"*a{i - 1}"] * 10)) for i in range(1, 30)]
    return "\n".join(lines)


TEXTS = (  # whole files
    "- a\n", "model: [", "model: {num_layers: 2", "a: &a [*a]\n", "model: &m {num_layers: *m}\n", "\tmodel: 1\n",
    "{" * 5000, "[" * 100_000, "- " * 50_000, "train: " + "{a: " * 90 + "1" + "}" * 90, "x" * 100_000 + ": 1",
    "train: {steps: 1:1" + ":1" * 50_000 + "}\n", "train: {steps: 0x" + "f" * 100_000 + "}\n", "seed: " + "x" * 100_000,
    "seed: !!python/object/apply:os.system ['true']\n", "seed: !!int x\n", "seed: !!timestamp x\n", "seed: !!bool x\n",
    "seed: !!binary '*'\n", "? [a, b]\n: c\n", "seed: 1\nseed: 2\n", "seed: 1\n---\nseed: 2\n", "seed: 1e999\n",
    "%YAML 9.9\n---\nseed: 1\n", "<<: 3\nseed: 1\n", "<<: [1, 2]\n", "\x00", "seed: \ud800\n", "a: *b\n",
    "model:\n  num_layers: 2\n hidden_size: 4\n", _bomb("[x, x, x, x]", "[{}]"), _bomb("{x: 1}", "{{<<: [{}]}}"),
)  # fmt: skip


def bad_config(number: int) -> tuple[str, str]:
    """What kind of mistake, and the text. The same number always gives the same one."""
    draw = random.Random(number)
    kind = KINDS[number % len(KINDS)]
    return kind.__name__, kind(draw)


def _with(changes: dict[str, Any], without: str = "") -> str:
    """The sound config with other values, and without a key."""
    import json

    nested = json.loads(json.dumps(SOUND))
    for path, value in changes.items():
        *sections, name = path.split(".")
        level = nested
        for section in sections:
            inner = level.get(section)
            level[section] = inner if isinstance(inner, dict) else {}
            level = level[section]
        level[name] = value
    if without:
        section, name = without.split(".")
        del nested[section][name]
    return json.dumps(nested, indent=1)  # which is YAML


def _options(info: FieldInfo) -> list[Any]:
    found = [info.annotation]
    for each in found:
        found += [option for option in get_args(each) if option not in found] if get_origin(each) is not tuple else []
    return found


def _of(draw: random.Random, wanted: type) -> str:
    return draw.choice([path for path, info in FIELDS.items() if wanted in _options(info)])


def wrong_type(draw: random.Random) -> str:
    path = draw.choice(
        [path for path, info in FIELDS.items() if {int, float, bool} & set(map(_hashable, _options(info)))]
    )
    return _with({path: draw.choice(["word", [1, "b"], {"no": 1}, [], "1.5.2", "2024-01-01x"])})


def _hashable(option: Any) -> Any:
    return option if isinstance(option, type) else None


def out_of_range(draw: random.Random) -> str:
    kind = draw.choice([int, float])
    paths = [p for p, i in FIELDS.items() if kind in _options(i) and _bounded(i) and bool not in _options(i)]
    return _with({draw.choice(paths): draw.choice([-1, -(10**9)])})


def _bounded(info: FieldInfo) -> bool:
    metadata = [*info.metadata, *(m for o in _options(info) for m in getattr(o, "__metadata__", ()))]
    return any(getattr(bound, key, None) is not None for bound in metadata for key in ("gt", "ge"))


def misspelt(draw: random.Random) -> str:
    path = draw.choice([path for path in FIELDS if "." in path])
    section, _, name = path.rpartition(".")
    at = draw.randrange(len(name))
    return _with({f"{section}.{name[:at]}{draw.choice('qxz_')}{name[at + 1 :]}x": 1})


def wrong_nesting(draw: random.Random) -> str:
    section = draw.choice([name for name in SECTIONS if name.count(".") < 2])
    return _with({section: draw.choice([3, "word", [1], ["a", {"b": 2}], True])})


def missing(draw: random.Random) -> str:
    return _with({draw.choice(list(FIELDS)): draw.choice([1, "x"])}, without=draw.choice(REQUIRED))


def contradictory(draw: random.Random) -> str:
    return _with(draw.choice(CONTRADICTIONS))


def huge(draw: random.Random) -> str:
    return _with({_of(draw, int): draw.choice(GIANTS)})


def no_expression(draw: random.Random) -> str:
    pattern = draw.choice(PATTERNS)
    return _with(
        draw.choice(
            [
                {"finetune.train": [pattern]},
                {"finetune.freeze": ["^embed", pattern]},
                {"optimizer.groups": [{"match": pattern}]},
            ]
        )
    )


def odd_text(draw: random.Random) -> str:
    return draw.choice(TEXTS)


def several(draw: random.Random) -> str:
    return _with({_of(draw, int): "word", _of(draw, float): [1], f"train.x{draw.randrange(99)}": 1})


KINDS: tuple[Callable[[random.Random], str], ...] = (
    wrong_type, out_of_range, misspelt, wrong_nesting, missing, contradictory, huge, no_expression, odd_text, several,
)  # fmt: skip
