"""YAML files and `a.b=c` overrides as plain values with their line numbers.

The YAML is what people write for YAML 1.1 parsers: JSON-like mappings with comments and trailing commas, `True` in any
case, and numbers such as `6e-4`, which YAML 1.1 reads as text and which are numbers here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from castalia.errors import ConfigError, refuse_pointer
from castalia.reading import MAX_DEPTH, MAX_DIGITS, MAX_SHOWN, MAX_YAML_VALUES, YamlLoader, short, yaml_problem

_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")  # base 60 included
_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+_]?[0-9]+|[-+]?\.[0-9]+[eE][-+]?[0-9]+")


@dataclass
class Findings:
    """Errors and notes, one line each, collected while a config is loaded."""

    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    values: int = 0  # YAML values read so far, counted against MAX_YAML_VALUES


class YamlMapping(dict[str, Any]):
    """A YAML mapping with the place of each key: `origins[key]` is "file.yml:12".

    `earlier` has the place before that of keys which a file gives more than once at its outermost level. A mapping
    merged from several sources also has in `precedences` the position of the source that gave each key.
    """

    def __init__(self, values: Mapping[str, Any] | None = None, origins: Mapping[str, str] | None = None) -> None:
        super().__init__(values or {})
        self.origins = dict(origins or {})
        self.earlier: dict[str, str] = {}
        self.precedences: dict[str, int] = {}


def mapping_from(values: Mapping[str, Any], origin: str) -> YamlMapping:
    """A nested mapping made by the program, all of whose keys have one origin."""
    inner = {key: mapping_from(value, origin) if isinstance(value, Mapping) else value for key, value in values.items()}
    return YamlMapping(inner, dict.fromkeys(values, origin))


def merged(old: Any, old_precedence: int, new: Any, new_precedence: int) -> Any:
    """`new`, completed by the keys that only `old` has if both are mappings; nested mappings likewise."""
    if not (isinstance(old, YamlMapping) and isinstance(new, YamlMapping)):
        return new
    table = YamlMapping({**old, **new}, {**old.origins, **new.origins})
    # Keys of `old` that came from still earlier sources keep theirs.
    table.precedences = dict.fromkeys(old, old_precedence) | old.precedences | dict.fromkeys(new, new_precedence)
    for key in old.keys() & new.keys():
        table[key] = merged(old[key], old_precedence, new[key], new_precedence)
        table.origins[key] += f", replacing {old.origins[key]}"
    return table


def read_file(path: Path, label: str, findings: Findings) -> YamlMapping:
    """The top-level mapping of a YAML file, which messages call `label`. Raises ConfigError for invalid YAML and for a
    file without keys, which is not a config."""
    try:
        text = path.read_text(encoding="utf-8")
        refuse_pointer(label, text[:64].encode(), ConfigError)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{label}: not UTF-8 text (byte {error.start}); a config is a YAML text file") from error
    before = len(findings.errors)
    table = read_text(text, label, findings)
    if not table and len(findings.errors) == before:
        raise _without_keys(label)
    return table


def read_text(text: str, label: str, findings: Findings) -> YamlMapping:
    """The top-level mapping of a YAML text, which messages call `label`. Raises ConfigError for invalid YAML."""
    root = _compose(text, label)
    if root is None:
        return YamlMapping()
    if not isinstance(root, yaml.MappingNode):
        raise _without_keys(f"{label}:{_line(root)}")
    return _mapping(root, label, findings, "", 0)


def _without_keys(place: str) -> ConfigError:
    return ConfigError(f"{place}: holds no keys; a config is a mapping such as `train: {{steps: 200}}`")


def read_override(text: str, findings: Findings) -> tuple[str, Any]:
    """Key and value of an override `a.b=c`, whose value is YAML. Raises ConfigError for invalid ones."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"command line: {text!r} is not an override; write key=value, for example train.steps=200")
    root = _compose(value, f"command line: {text if len(text) <= MAX_SHOWN else short(text)}")
    return key.strip(), None if root is None else _value(root, "command line", findings, key.strip(), 0)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_value` would read as a number."""


_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar(_TEXT, text, style='"' if _NUMBER.fullmatch(text) else None)
)


def to_yaml(values: dict[str, Any]) -> str:
    """YAML text that is read back as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=120)


def _compose(text: str, label: str) -> yaml.Node | None:
    if problem := yaml_problem(text):
        raise ConfigError(f"{label}: refused: {problem}")
    try:
        return yaml.compose(text, Loader=YamlLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and not label.startswith("command line") else ""
        context = f" ({error.context} from line {error.context_mark.line + 1})" if error.context_mark else ""
        raise ConfigError(
            f"{label}{line}: not valid YAML: {error.problem}{context}; "
            "look for a missing comma, quote or bracket here or on the line before"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{label}: not valid YAML: {error}".replace("\n", " ")) from error


def _mapping(node: yaml.MappingNode, label: str, findings: Findings, prefix: str, depth: int) -> YamlMapping:
    _count(label, findings, depth)
    table = YamlMapping()
    for key_node, value_node in _pairs(node, label, findings, depth):
        key, origin = str(key_node.value), f"{label}:{_line(key_node)}"
        if not isinstance(key_node, yaml.ScalarNode):
            findings.errors.append(f"{origin}: a key must be a word, not a list or a mapping")
        elif key in table and prefix:  # PyYAML itself would silently take the last one
            findings.errors.append(f"{origin}: {prefix}{already_given(key, table.origins[key])}; keep one")
        else:
            if key in table:
                table.earlier[key] = table.origins[key]
            table[key] = _value(value_node, label, findings, f"{prefix}{key}", depth + 1)
            table.origins[key] = origin
    return table


def already_given(key: str, where: str) -> str:
    """What is said of a key that its file has at an earlier place, too."""
    return f"{key} is already given on line {where.rpartition(':')[2]}"


def _count(label: str, findings: Findings, depth: int) -> None:
    """Bound what aliases expand to: a short text can stand for billions of values, or for a value inside itself."""
    findings.values += 1
    if findings.values > MAX_YAML_VALUES or depth > MAX_DEPTH:
        raise ConfigError(
            f"{label}: an anchor (&name) holds an alias (*name) of itself, or aliases make endless values of a few; "
            "write the values out"
        )


def _pairs(node: yaml.MappingNode, label: str, findings: Findings, depth: int) -> list[tuple[yaml.Node, yaml.Node]]:
    """A mapping's own keys, then the keys of the mappings it merges (`<<: *defaults`), where not yet given."""
    _count(label, findings, depth)
    pairs = [pair for pair in node.value if pair[0].tag != _MERGE]
    for key_node, merged_node in node.value:
        if key_node.tag != _MERGE:
            continue
        for source in merged_node.value if isinstance(merged_node, yaml.SequenceNode) else [merged_node]:
            if not isinstance(source, yaml.MappingNode):
                findings.errors.append(
                    f"{label}:{_line(key_node)}: << merges mappings, such as *defaults, and lists of them"
                )
                continue
            known = {key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)}
            pairs += [pair for pair in _pairs(source, label, findings, depth + 1) if pair[0].value not in known]
    return pairs


def _value(node: yaml.Node, label: str, findings: Findings, path: str, depth: int) -> Any:
    _count(label, findings, depth)
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, label, findings, path + ".", depth)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, label, findings, path, depth + 1) for item in node.value]
    # YAML 1.1 wants a dot and a sign in the exponent (6.0e-4), which people leave out. Quoted text stays text.
    # GPT-NeoX's gmlp_small.yml has 1.0e_8, which stops it there; its other configs have 1.0e-8.
    typo = label == "command line" and "_" in node.value
    if node.tag == _TEXT and not node.style and _NUMBER.fullmatch(node.value) and not typo:
        number = float(node.value.replace("_", "-"))
        origin = label if label == "command line" else f"{label}:{_line(node)}"
        if origin != "command line":
            findings.notes.append(
                f"{origin}: {path}: {node.value} is read as the number {number:g} (YAML 1.1 takes it for text)"
            )
        return int(number) if number.is_integer() and abs(number) >= 1 else number
    return _scalar(node, label, findings, path)


def _scalar(node: yaml.Node, label: str, findings: Findings, path: str) -> Any:
    try:
        # PyYAML converts base 60 digit by digit, in quadratic time.
        if node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
            raise ValueError(f"a number of {len(node.value)} characters")
        return yaml.constructor.SafeConstructor().construct_object(node)
    except (yaml.constructor.ConstructorError, ValueError, LookupError, AttributeError, OverflowError) as error:
        reason = getattr(error, "problem", None) or error
        findings.errors.append(f"{label}:{_line(node)}: {path}: {short(node.value)} cannot be read: {reason}")
        return None


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
