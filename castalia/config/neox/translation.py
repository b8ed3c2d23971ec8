"""NeoX's merged keys on the way to our settings: what the functions for keys that belong together work with."""

from __future__ import annotations

from typing import Any

from castalia.config.fields import FIELDS
from castalia.config.neox.keys import FORMER, KEYS, Key, lower
from castalia.config.setting import NEOX_DEFAULT, Setting
from castalia.config.yaml_files import Findings


class Translation:
    """NeoX's merged keys on the way to our settings."""

    def __init__(self, theirs: dict[str, Setting], ours: dict[str, Setting], num_files: int, found: Findings) -> None:
        self.given = {key: setting for key, setting in theirs.items() if setting.value is not None}
        self.ours = ours
        self.found = found
        self.settings: dict[str, Setting] = {}
        in_files = {key for key, setting in self.given.items() if setting.rank < num_files}
        self.architecture = "num_layers" in in_files and "model.num_layers" not in ours
        self.training = bool({"optimizer", "train_iters", "train_epochs"} & in_files)

    def __getitem__(self, key: str) -> Any:
        """A key's value, or its default."""
        return self.given[key].value if key in self.given else KEYS[key].default

    def has(self, *keys: str) -> bool:
        return any(key in self.given for key in keys)

    def set(self, path: str, value: Any, *keys: str) -> None:
        """Set one of ours from the values of `keys`; without any given it is a default and may go without saying."""
        given = [self.given[key] for key in keys if key in self.given]
        if given:
            self.settings[path] = max(given, key=lambda setting: setting.rank)._replace(value=value)
        elif value != FIELDS[path].default:
            self.settings[path] = Setting(value, NEOX_DEFAULT, -1)

    def set_inner(self, path: str, value: Any, key: str, block: dict[str, Any], inner: str) -> None:
        """Set one of ours from a value inside NeoX's block `key`: it knows its own line."""
        outer = self.given[key]
        origins, ranks = getattr(block, "origins", {}), getattr(block, "ranks", {})
        self.settings[path] = Setting(value, origins.get(inner, outer.origin), ranks.get(inner, outer.rank))

    def error(self, key: str, text: str) -> None:
        self.found.errors.append(f"{self.given[key].origin}: {key}{self._value(key)} {text}")

    def note(self, key: str, text: str) -> None:
        self.found.notes.append(f"{self.given[key].origin}: {key}{self._value(key)} {text}")

    def _value(self, key: str) -> str:
        value = self.given[key].value
        return f": {value!r}" if isinstance(value, str | int | float) else ""

    def honour(self, key: str) -> None:
        row = KEYS[key]
        active = self.architecture if row.target.startswith("model.") else self.training
        active = active and not row.target.startswith("generate.")  # what a model's own files say comes before these
        if key not in self.given and not (active and row.default is not None):
            return
        try:
            self.set(row.target, row.convert(self[key]) if row.convert else self[key], key)
        except ValueError as error:
            self.error(key, f"{error}")

    def require_type(self, key: str) -> None:
        """Leave out a value that the functions below could not read."""
        value, expected = self[key], KEYS[key].type or object
        if expected is list and isinstance(value, str):
            return  # one path where a list of paths is expected
        if key in self.given and not is_a(value, expected):
            self.error(key, f"is no {TYPE_NAMES[expected]}")
            del self.given[key]

    def report(self, key: str) -> None:
        row = row_of(key)
        if key not in self.given or is_off(self.given[key].value, row.default):
            return
        if row.kind == "idle":
            self.note(key, f"has no effect here: {row.target}")
        else:
            off = "" if row.default is None else f" or set it to {row.default}"
            self.error(key, f"is refused: {row.target}; remove the key{off}")


def row_of(key: str) -> Key:
    """What the table says of a key of today's or of an older release."""
    return KEYS.get(key) or FORMER[key]


TYPE_NAMES = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
    list: "list",
    dict: "block such as {key: value}",
}


def is_a(value: Any, expected: type) -> bool:
    """Strictly: true is no number, but a whole number is one."""
    if isinstance(value, bool):
        return expected is bool
    return isinstance(value, int | float) if expected is float else isinstance(value, expected)


def is_off(value: Any, default: Any) -> bool:
    """Whether a value asks for nothing that its default does not."""
    switched_off = isinstance(value, dict) and value.get("enabled") is False
    return (
        (value is False and default is not True) or value in ([], {}) or switched_off or lower(value) == lower(default)
    )
