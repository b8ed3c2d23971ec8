"""Chat templates in Jinja, rendered as `transformers` renders them, within the bounds of `template_bounds.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from importlib import import_module
from typing import Any, NamedTuple

from castalia.data.template_bounds import Counter, bounded_environment, count_nodes, counted
from castalia.errors import DataError

FAILURES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError)


class Rendered(NamedTuple):
    """The text of a conversation, and which of its characters the template marks as written by the model."""

    text: str
    generated: list[tuple[int, int]]  # [start, stop) of each {% generation %} ... {% endgeneration %}


def compile_template(source: str) -> tuple[Callable[..., Rendered], Callable[[Any], Any]]:
    """A function that renders a conversation, given as `messages=...`, and one that prepares the content of a message.

    Raises DataError if the template is not valid Jinja. The first function raises ValueError, in one line, if a
    conversation does not render or exceeds the bounds; the second for content that is not text.
    """
    jinja, nodes, extensions = map(import_module, ("jinja2", "jinja2.nodes", "jinja2.ext"))
    counter = Counter()

    class Generation(extensions.Extension):  # type: ignore[name-defined]
        """The block {% generation %} ... {% endgeneration %}, which marks text that the model writes."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Callable[[], str]) -> str:
            text = caller()
            return f"{START}{text}{END}"

    environment = bounded_environment(counter)(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        finalize=counter.put,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.filters = {name: counted(name, function, counter) for name, function in environment.filters.items()}
    environment.tests = {name: counted(name, function, counter) for name, function in environment.tests.items()}
    environment.globals["strftime_now"] = strftime_now
    del environment.globals["lipsum"]  # it makes random text

    def refuse(message: str) -> None:
        raise jinja.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    try:
        tree = environment.parse(source)
        content = _content_rule(tree, nodes)
        code = environment.compile(count_nodes(tree))
        template = environment.template_class.from_code(environment, code, environment.make_globals(None))
    except jinja.TemplateSyntaxError as error:
        raise DataError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
    except RecursionError as error:
        raise DataError("the chat template is nested too deeply") from error

    def render(**values: Any) -> Rendered:
        try:
            counter.begin(values)
            return _cut_marks(template.render(**{"tools": None, "documents": None} | values))
        except (jinja.TemplateError, *FAILURES) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the chat template does not render: {reason}") from None

    return render, content


START, END = "\ue000\ufdd0", "\ue000\ufdd1"  # around generated text; U+FDD0 and U+FDD1 are never characters


def _cut_marks(text: str) -> Rendered:
    """The text without the marks, and the spans that they enclosed."""
    whole, generated = "", []
    for number, part in enumerate(text.split(START)):
        inner, _, rest = part.partition(END) if number else ("", "", part)
        if number:
            generated.append((len(whole), len(whole) + len(inner)))
        whole += inner + rest
    return Rendered(whole, generated)


def strftime_now(format: str) -> str:
    """The current time, as templates of `transformers` may ask for it."""
    return datetime.now().strftime(format)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _content_rule(tree: Any, nodes: Any) -> Callable[[Any], Any]:
    """A function that turns the content of a message into what the template expects.

    Unless the template tests for null, null becomes empty text; unless it loops over content or tests its type, parts
    of content are joined. The function raises ValueError for parts that are not text.
    """
    tests = {test.name for test in tree.find_all(nodes.Test)}
    nulls = "none" in tests or any(constant.value is None for constant in tree.find_all(nodes.Const))
    loops = any(_is_content(part, nodes) for loop in tree.find_all(nodes.For) for part in _all(loop.iter, nodes))
    lists = loops or bool(tests & {"string", "iterable", "sequence", "mapping"})

    def content(value: Any) -> Any:
        if value is None:
            return None if nulls else ""
        if not isinstance(value, list) or lists:
            return value
        return "".join(map(_text, value))

    return content


def _all(node: Any, nodes: Any) -> Sequence[Any]:
    return [node, *node.find_all(nodes.Expr)]


def _is_content(node: Any, nodes: Any) -> bool:
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return (isinstance(node, nodes.Getattr) and node.attr == "content") or (
        isinstance(node, nodes.Name) and node.name == "content"
    )


def _text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ValueError(f"a message's content has a part of type {kind!r}, from which this template makes no text")
