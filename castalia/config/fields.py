"""The schema and its values as flat dotted paths: which keys exist, what they mean, what they may be set to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from castalia.config.schema import LARGEST, RunConfig, Section


# Path, field and whether it is a section, of all fields below a section class, outermost first.
def _walk(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo, bool]]:
    for name, info in section.model_fields.items():
        inner = _section_of(info.annotation)
        yield prefix + name, info, inner is not None
        if inner:
            yield from _walk(inner, f"{prefix}{name}.")


def _section_of(annotation: Any) -> type[Section] | None:
    # Optional sections are unions with None. Lists of sections (tuples) are plain values for a path.
    candidates = [annotation, *get_args(annotation)] if get_origin(annotation) is not tuple else []
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def section_in(annotation: Any) -> type[Section] | None:
    """The section class of a list's entries, None if they are plain values."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(section_in, get_args(annotation))), None)


FIELDS = {path: info for path, info, is_section in _walk(RunConfig) if not is_section}
SECTIONS = {path: info for path, info, is_section in _walk(RunConfig) if is_section}


def values(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Path and value of everything in a config; an optional section that is absent is one None."""

    def walk(section: Section, prefix: str) -> Iterator[tuple[str, Any]]:
        for name in type(section).model_fields:
            value = getattr(section, name)
            if isinstance(value, Section):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return walk(config, "")


def changed(config: RunConfig) -> dict[str, Any]:
    """Path and value of everything that differs from its default."""
    return {path: value for path, value in values(config) if not is_default(path, value)}


def is_default(path: str, value: Any) -> bool:
    """Whether a value is the one that a config has without it."""
    info = FIELDS.get(path) or SECTIONS[path]
    return not info.is_required() and bool(value == info.default)


def describe(path: str) -> str:
    """What a key may be set to: "a whole number above 0 (default 1000): batches of one evaluation"."""
    info = FIELDS.get(path) or SECTIONS.get(path)
    if info is None:
        return "no key of ours"
    return describe_field(info)


def describe_field(info: FieldInfo) -> str:
    """Type, limits, default and description of a field, as `describe` gives them for a path."""
    default = "" if info.is_required() else f" (default {_text(info.default)})"
    meaning = f": {info.description}".replace("None:", "null:") if info.description else ""
    return f"{_kind(info.annotation, info.metadata)}{default}{meaning}"


def _text(value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    return "null" if value is None else repr(value) if isinstance(value, str) and not value.strip() else str(value)


def _kind(annotation: Any, metadata: list[Any]) -> str:
    options = [option for option in get_args(annotation) if option is not type(None)]
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, options))
    if hasattr(annotation, "__metadata__"):
        return _kind(annotation.__origin__, [*annotation.__metadata__, *metadata])
    if options and get_origin(annotation) is not tuple:
        kinds = dict.fromkeys(_kind(option, metadata) for option in options)
        return ", or ".join(kinds) + (" or null" if type(None) in get_args(annotation) else "")
    if get_origin(annotation) is tuple:
        return "a list" if Ellipsis in get_args(annotation) else f"a list of {len(options)}"
    # The bound LARGEST exists to keep numbers sane; naming it would only distract.
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    limits = [
        f"{word} {value}"
        for bound in metadata
        for key, word in _LIMITS
        if (value := getattr(bound, key, None)) is not None and value != LARGEST
    ]
    return " ".join([names.get(annotation, "a section"), " and ".join(limits)]).strip()


_LIMITS = (("gt", "above"), ("ge", "of at least"), ("lt", "below"), ("le", "of at most"))
