"""Configs with a reason beside each value, as YAML that a person can read, edit and run again."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from castalia.config.load import load_config
from castalia.config.schema import RunConfig
from castalia.config.yaml_files import to_yaml

COLUMN, WIDTH = 34, 100  # of the comments, and of the lines

Settings = dict[str, tuple[Any, str]]  # dotted path of a key -> its value and why


def load(values: Settings, words: Sequence[str]) -> RunConfig:
    """The config that the settings and the user's `key=value` words make."""
    return load_config([nested(values)], words)


def overridden(values: Settings, config: RunConfig) -> Settings:
    """The settings with what the user's words changed or added in `config`, and without what they replaced."""
    settings = {path: entry for path, entry in values.items() if path in config.origins}
    for path, origin in config.origins.items():
        if path not in settings or not origin.startswith("keys:"):  # of the mapping that `load` makes of the settings
            why = "as you asked" if origin.startswith("command line") else f"from {origin.partition(', replacing')[0]}"
            settings[path] = (_value(config, path), why)
    return settings


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
