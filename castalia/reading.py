"""Safe reading of text from untrusted sources: JSON, JSON lines, YAML, regular expressions.

For any input the result is, in bounded time and memory, either a value of the declared type or an error of one line
that names the file and the key.
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
MAX_YAML_VALUES = 100_000  # after aliases are expanded, which guards against exponential growth
MAX_DIGITS = 64  # of a number in YAML, where digits in base 60 make conversion quadratic
MAX_PATTERN = 1000  # characters of a regular expression
MAX_SHOWN = 100  # characters of a value in a message

REASONS = {
    "int_type": "is not a whole number",
    "int_from_float": "is not a whole number",
    "float_type": "is not a number",
    "bool_type": "is neither true nor false",
    "string_type": "is not text",
    "tuple_type": "is not a list",
    "list_type": "is not a list",
    "dict_type": "is not a mapping of names to values",
    "missing": "is missing",
    "extra_forbidden": "is unknown to this version of castalia",
}
YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def keys(types: Mapping[str, Any], required: Iterable[str] = ()) -> Any:
    """The type of a JSON object whose keys, if present, have these types. Other keys may have any value.

    `required`: keys that must be present.
    """
    must = frozenset(required)
    settings = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    attributes = {"__required_keys__": must, "__optional_keys__": types.keys() - must, "__pydantic_config__": settings}
    shape: Any = TypedDict("Keys", dict(types), total=False)  # type: ignore[misc]
    for name, value in attributes.items():
        setattr(shape, name, value)
    return shape


def parse_json(content: str | bytes, where: str, error: type[CastaliaError], shape: Any = Any) -> Any:
    """Parse JSON as a value of type `shape`. Raises `error`, whose message names `where` and the key."""
    if len(content) > MAX_JSON_BYTES:
        raise error(f"{where} is refused: JSON of {len(content)} bytes, which nothing needs")
    try:
        value = plain_json(content)
    except ValueError as problem:
        raise error(f"{where} is damaged, it cannot be parsed: {problem}; get it again") from problem
    return typed(value, where, error, shape)


def plain_json(content: str | bytes) -> Any:
    """Parse JSON of any type. Raises ValueError for invalid JSON and for nesting deeper than MAX_DEPTH."""
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
    """Whether lists and mappings are nested more than `depth` levels deep."""
    level = [value] if type(value) in (dict, list) else []  # the only containers that JSON has
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
    """Parse a JSON file as `parse_json` does. Raises `error`."""
    return parse_json(read_bytes(path, error), str(path), error, shape)


def read_bytes(path: Path, error: type[CastaliaError]) -> bytes:
    """The content of a file. Raises `error` if it cannot be read or is a Git LFS pointer."""
    try:
        content = path.read_bytes()
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror}") from problem
    refuse_pointer(path, content, error)
    return content


def read_records(lines: Iterable[bytes], where: str, shape: Any) -> Iterator[Any]:
    """Parse JSON lines, each of type `shape`. A bad record is skipped and reported once on stderr.

    A last line without a newline, as a killed process leaves it, is skipped silently.
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
    """The value, checked without conversion against `shape`, any type that pydantic knows.

    Raises `error` with a line for each problem.
    """
    if shape is Any:
        return value
    try:
        adapter = _adapter(shape)
        if is_dataclass(shape) or (isinstance(shape, type) and issubclass(shape, BaseModel)):
            # From JSON, because pydantic's strict mode accepts lists for tuples and mappings for classes only there.
            return adapter.validate_json(json.dumps(value), strict=True)
        return adapter.validate_python(value, strict=True)
    except ValidationError as problems:
        lines = [_line(where, problem) for problem in problems.errors()[:5]]
        raise error("\n".join(dict.fromkeys(lines))) from problems


@lru_cache(maxsize=100)
def _adapter(shape: Any) -> Any:
    return TypeAdapter(shape)


def _line(where: str, problem: Any) -> str:
    path = ".".join(map(str, problem["loc"]))
    if not path:
        return f"{where} is damaged: it holds a {type(problem['input']).__name__} instead of an object; get it again"
    value = "" if problem["type"] == "missing" else f"={short(problem['input'])}"
    return f"{where}: {path}{value} {reason(problem)}"


def reason(problem: Any) -> str:
    """The text for one of pydantic's errors (an entry of `ValidationError.errors()`), as in "is not a number"."""
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "is not")
    return REASONS.get(problem["type"], message)


def short(value: Any) -> str:
    """A value for a message, cut after MAX_SHOWN characters."""
    if isinstance(value, int) and abs(value) >= 10**MAX_SHOWN:
        return "a giant number"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def yaml_problem(text: str) -> str | None:
    """Why a YAML text is refused before it is constructed: size or depth. None for others, syntax errors included."""
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
        pass  # reported, with its line, when the text is constructed
    return None


@lru_cache(maxsize=1000)
def _compiled(pattern: str) -> Any:
    import re2

    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    return re2.compile(pattern, options)


def expression_problem(pattern: str) -> str | None:
    """Why a text is not a valid regular expression, None if it is. RE2 is used because its time is linear."""
    if len(pattern) > MAX_PATTERN:
        return f"it has {len(pattern)} characters, more than {MAX_PATTERN}"
    import re2

    try:
        _compiled(pattern)
    except (re2.error, UnicodeEncodeError) as problem:
        (message,) = problem.args[:1] if isinstance(problem, re2.error) else (str(problem),)
        return message.decode(errors="replace") if isinstance(message, bytes) else str(message)
    return None


def expression(pattern: str) -> str:
    """The pattern unchanged, as a pydantic validator. Raises ValueError if it is not a valid regular expression."""
    if problem := expression_problem(pattern):
        raise ValueError(f"is not a valid regular expression: {problem}")
    return pattern


def fits(pattern: str, name: str) -> bool:
    """Whether a regular expression matches somewhere in a name. Raises CastaliaError for an invalid one."""
    if problem := expression_problem(pattern):
        raise CastaliaError(f"{short(pattern)} is not a valid regular expression: {problem}")
    return _compiled(pattern).search(name) is not None
