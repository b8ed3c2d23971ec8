"""What strangers wrote, read within bounds and as what the reader needs: JSON, JSON lines, YAML, regular expressions.

Whatever the text, the answer is a value of the declared type or one line that names file and key, in bounded time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from castalia.errors import CastaliaError, refuse_pointer

MAX_DEPTH = 100  # levels of lists and mappings
MAX_JSON_BYTES = 1 << 30  # a vocabulary has tens of megabytes, the index of a large model's shards a few
MAX_YAML_BYTES = 4 << 20
MAX_YAML_VALUES = 100_000  # when all aliases are followed
MAX_DIGITS = 64  # of a number in YAML, whose notations include base 60
MAX_PATTERN = 1000  # characters
MAX_SHOWN = 100  # characters of a value in a message

REASONS = {
    "int_type": "is no whole number",
    "int_from_float": "is no whole number",
    "float_type": "is no number",
    "bool_type": "is neither true nor false",
    "string_type": "is no text",
    "tuple_type": "is no list",
    "list_type": "is no list",
    "dict_type": "is no table of names and values",
    "missing": "is missing",
    "extra_forbidden": "is unknown to this version of castalia",
}
YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def keys(types: Mapping[str, Any], required: Iterable[str] = ()) -> Any:
    """The type of a JSON object in which these keys, where they are there, are of these types; others may be anything.

    `required` ones must be there.
    """
    must = frozenset(required)
    settings = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    told = {"__required_keys__": must, "__optional_keys__": types.keys() - must, "__pydantic_config__": settings}
    shape: Any = TypedDict("Keys", dict(types), total=False)  # type: ignore[misc]
    for name, value in told.items():
        setattr(shape, name, value)
    return shape


def parse_json(content: str | bytes, where: str, error: type[CastaliaError], shape: Any = Any) -> Any:
    """The value, of type `shape`. Raises `error`, which names `where` it stands, and the key."""
    if len(content) > MAX_JSON_BYTES:
        raise error(f"{where} is refused: JSON of {len(content)} bytes, which nothing needs")
    try:
        value = plain_json(content)
    except ValueError as problem:
        raise error(f"{where} is damaged, it cannot be parsed: {problem}; get it again") from problem
    return typed(value, where, error, shape)


def plain_json(content: str | bytes) -> Any:
    """The value, whatever it is. Raises ValueError, for a nesting that is too deep as well."""
    try:
        if isinstance(content, bytes):
            content = content.decode("utf-8-sig")
        value = json.loads(content)
    except UnicodeDecodeError as problem:
        raise ValueError(f"not UTF-8 at byte {problem.start}") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None
    if content.count("[") + content.count("{") > MAX_DEPTH and _deeper(value, MAX_DEPTH):
        raise ValueError("JSON that is nested too deep")
    return value


def _deeper(value: Any, depth: int) -> bool:
    """Whether containers stand in each other more than `depth` levels deep."""
    level = [value] if type(value) in (dict, list) else []  # which are all that JSON makes
    while level and depth >= 0:
        depth -= 1
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) in (dict, list)
        ]
    return bool(level)


def read_json(path: Path, error: type[CastaliaError], shape: Any = Any) -> Any:
    """`parse_json` of a file."""
    return parse_json(read_bytes(path, error), str(path), error, shape)


def read_bytes(path: Path, error: type[CastaliaError]) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror}") from problem
    refuse_pointer(path, content, error)
    return content


def read_records(lines: Iterable[bytes], where: str, shape: Any) -> Iterator[Any]:
    """The records of JSON lines that a program appended. A bad one is named, once, on stderr and left out.

    A last line without an end, which a killed process left, is left out without a word.
    """
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            return
        try:
            yield parse_json(line, f"{where}:{number}", CastaliaError, shape)
        except CastaliaError as problem:
            _name_once(str(problem).removesuffix("; get it again"))


@lru_cache(maxsize=1000)
def _name_once(problem: str) -> None:
    print(f"note: {problem}; this record is left out", file=sys.stderr)


def typed(value: Any, where: str, error: type[CastaliaError], shape: Any) -> Any:
    """The value as `shape`, a type that pydantic knows: nothing is converted. Raises `error` with a line a problem."""
    if shape is Any:
        return value
    try:
        adapter = _adapter(shape)
        if is_dataclass(shape) or (isinstance(shape, type) and issubclass(shape, BaseModel)):
            # from JSON, because only there does strict checking take lists for tuples and tables for classes
            return adapter.validate_json(json.dumps(value), strict=True)
        return adapter.validate_python(value, strict=True)
    except ValidationError as problems:
        lines = [_line(where, found) for found in problems.errors()[:5]]
        raise error("\n".join(dict.fromkeys(lines))) from problems


@lru_cache(maxsize=100)
def _adapter(shape: Any) -> Any:
    return TypeAdapter(shape)


def _line(where: str, found: Any) -> str:
    path = ".".join(map(str, found["loc"]))
    if not path:
        return f"{where} is damaged: it holds a {type(found['input']).__name__} instead of an object; get it again"
    value = "" if found["type"] == "missing" else f"={short(found['input'])}"
    return f"{where}: {path}{value} {reason(found)}"


def reason(found: Any) -> str:
    """One of pydantic's complaints in our words."""
    told = found["msg"].removeprefix("Value error, ").replace("Input should be", "is not")
    return REASONS.get(found["type"], told)


def short(value: Any) -> str:
    """A value in a message, cut where it is long."""
    if isinstance(value, int) and abs(value) >= 10**MAX_SHOWN:
        return "a giant number"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def yaml_problem(text: str) -> str | None:
    """Why a text is refused before anything is built of it: its size, its depth. Syntax errors are none of these."""
    if len(text) > MAX_YAML_BYTES:
        return f"{len(text)} characters of YAML, which no config needs"
    depth = 0
    try:
        for event in yaml.parse(text, Loader=YamlLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > MAX_DEPTH:
                    return "lists and mappings are nested too deep"
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
    except yaml.YAMLError:
        pass  # who builds it says what and where
    return None


@lru_cache(maxsize=1000)
def _compiled(pattern: str) -> Any:
    import re2

    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    return re2.compile(pattern, options)


def expression_problem(pattern: str) -> str | None:
    """Why a text is no regular expression that can be searched for. The syntax is RE2's, whose time is linear."""
    if len(pattern) > MAX_PATTERN:
        return f"it has {len(pattern)} characters, more than {MAX_PATTERN}"
    import re2

    try:
        _compiled(pattern)
    except (re2.error, UnicodeEncodeError) as problem:
        (told,) = problem.args[:1] if isinstance(problem, re2.error) else (str(problem),)
        return told.decode(errors="replace") if isinstance(told, bytes) else str(told)
    return None


def expression(pattern: str) -> str:
    """The pattern itself, for types. Raises ValueError for one that is none."""
    if problem := expression_problem(pattern):
        raise ValueError(f"is no regular expression: {problem}")
    return pattern


def fits(pattern: str, name: str) -> bool:
    """Whether a regular expression fits somewhere in a name. Raises CastaliaError for one that is none."""
    if problem := expression_problem(pattern):
        raise CastaliaError(f"{short(pattern)} is no regular expression: {problem}")
    return _compiled(pattern).search(name) is not None
