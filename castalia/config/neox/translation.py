"""The state of a translation from GPT-NeoX's keys to our settings, which the functions for joint keys work on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from castalia.config.fields import FIELDS
from castalia.config.neox.keys import FORMER, KEYS, Key, lower
from castalia.config.notes import WithoutEffect
from castalia.config.setting import NEOX_DEFAULT, Setting
from castalia.config.yaml_files import Findings


class Translation:
    """GPT-NeoX's merged keys, and our settings as far as they have been translated.

    `given`: GPT-NeoX's keys that have a value. `ours`: settings given in our own terms. `architecture`, `training`:
    whether files in GPT-NeoX's terms describe a model or a training run, so that GPT-NeoX's defaults apply.
    """

    def __init__(self, neox: dict[str, Setting], ours: dict[str, Setting], num_files: int, findings: Findings) -> None:
        self.given = {key: setting for key, setting in neox.items() if setting.value is not None}
        self.ours = ours
        self.findings = findings
        self.settings: dict[str, Setting] = {}
        # Overrides alone (train_iters=200 for a config of ours) do not bring in GPT-NeoX's defaults.
        in_files = {key for key, setting in self.given.items() if setting.precedence < num_files}
        self.architecture = "num_layers" in in_files and "model.num_layers" not in ours
        self.training = bool({"optimizer", "train_iters", "train_epochs"} & in_files)

    def __getitem__(self, key: str) -> Any:
        """The value of a GPT-NeoX key, or its default there."""
        return self.given[key].value if key in self.given else KEYS[key].default

    def has(self, *keys: str) -> bool:
        """Whether any of these keys is given."""
        return any(key in self.given for key in keys)

    def set(self, path: str, value: Any, *keys: str) -> None:
        """Set one of our keys, derived from `keys`. If none of them is given, the value is a GPT-NeoX default."""
        given = [self.given[key] for key in keys if key in self.given]
        if given:
            # The latest of the keys is where the value would have to be changed.
            self.settings[path] = max(given, key=lambda setting: setting.precedence)._replace(value=value)
        elif value != FIELDS[path].default:
            self.settings[path] = Setting(value, NEOX_DEFAULT, -1)

    def set_inner(self, path: str, value: Any, key: str, block: dict[str, Any], inner: str) -> None:
        """Set one of our keys from the value `inner` of GPT-NeoX's block `key`, whose own line becomes the origin."""
        outer = self.given[key]
        origins, precedences = getattr(block, "origins", {}), getattr(block, "precedences", {})
        self.settings[path] = Setting(value, origins.get(inner, outer.origin), precedences.get(inner, outer.precedence))

    def error(self, key: str, text: str) -> None:
        """Add an error about a given key."""
        self.findings.errors.append(f"{self.given[key].origin}: {key}{self._value(key)} {text}")

    def note(self, key: str, text: str) -> None:
        """Add a note about a given key."""
        self.findings.notes.append(f"{self.given[key].origin}: {key}{self._value(key)} {text}")

    def idle(self, key: str, reason: str, inner: Sequence[str] = ()) -> None:
        """Add the note that a given key has no effect, or that `inner` keys of its block have none."""
        named = f": {', '.join(inner)}" if inner else self._value(key)
        has = "have" if len(inner) > 1 else "has"
        text = f"{self.given[key].origin}: {key}{named} {has} no effect here: {reason}"
        self.findings.notes.append(WithoutEffect(text))

    def _value(self, key: str) -> str:
        value = self.given[key].value
        return f": {value!r}" if isinstance(value, str | int | float) else ""

    def honour(self, key: str) -> None:
        """Translate a key of kind `to`, or its default where GPT-NeoX's defaults apply."""
        row = KEYS[key]
        active = self.architecture if row.target.startswith("model.") else self.training
        # A model's generation_config.json takes precedence over GPT-NeoX's defaults.
        active = active and not row.target.startswith("generate.")
        if key not in self.given and not (active and row.default is not None):
            return
        try:
            self.set(row.target, row.convert(self[key]) if row.convert else self[key], key)
        except ValueError as error:
            self.error(key, f"{error}")

    def require_type(self, key: str) -> None:
        """Add an error for a joint key of the wrong type, and drop it, so that no function meets it."""
        value, expected = self[key], KEYS[key].type or object
        if expected is list and isinstance(value, str):
            return  # a single path in place of a list of paths
        if key in self.given and not is_a(value, expected):
            self.error(key, f"is not {TYPE_NAMES[expected]}")
            del self.given[key]

    def report(self, key: str) -> None:
        """Add a note for an idle key and an error for a refused one, unless it is switched off."""
        row = row_of(key)
        if key not in self.given or is_off(self.given[key].value, row.default):
            return
        if row.kind == "idle":
            self.idle(key, row.target)
        else:
            off = "" if row.default is None else f" or set it to {row.default}"
            self.error(key, f"is refused: {row.target}; remove the key{off}")


def row_of(key: str) -> Key:
    """The table's row for a key of the current or an older release."""
    return KEYS.get(key) or FORMER[key]


TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a block such as {key: value}",
}


def is_a(value: Any, expected: type) -> bool:
    """Strict type check: a bool is not a number, but an int is a float."""
    if isinstance(value, bool):
        return expected is bool
    return isinstance(value, int | float) if expected is float else isinstance(value, expected)


def is_off(value: Any, default: Any) -> bool:
    """Whether a value asks for no more than the default: it is equal, empty, false or disabled."""
    switched_off = isinstance(value, dict) and value.get("enabled") is False
    return (
        (value is False and default is not True) or value in ([], {}) or switched_off or lower(value) == lower(default)
    )
