"""Chat templates in Jinja, as `transformers` renders them, but within bounds of time and size.

The bounds are those of `castalia.data.template_bounds`.
"""

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
    text: str
    generated: list[
        tuple[int, int]
    ]  # characters from, to: what stands between {% generation %} and {% endgeneration %}


def compile_template(source: str) -> tuple[Callable[..., Rendered], Callable[[Any], Any]]:
    """How conversations are rendered with the template (`messages=` and so on), and how its messages' content must be.

    DataError if it is no Jinja; the renderer raises ValueError, in one line, for what does not render.
    """
    jinja, nodes, extensions = map(import_module, ("jinja2", "jinja2.nodes", "jinja2.ext"))
    counter = Counter()

    class Generation(extensions.Extension):  # type: ignore[name-defined]
        """Marks what the model is to write: {% generation %} ... {% endgeneration %}."""

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
    environment.filters = {name: counted(name, each, counter) for name, each in environment.filters.items()}
    environment.tests = {name: counted(name, each, counter) for name, each in environment.tests.items()}
    environment.globals["strftime_now"] = strftime_now
    del environment.globals["lipsum"]  # text at random

    def refuse(message: str) -> None:
        raise jinja.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    try:
        tree = environment.parse(source)
        content = _content_rule(tree, nodes)
        code = environment.compile(count_nodes(tree))
        template = environment.template_class.from_code(environment, code, environment.make_globals(None))
    except jinja.TemplateSyntaxError as error:
        raise DataError(f"the chat template is no Jinja: line {error.lineno}: {error.message}") from error
    except RecursionError as error:
        raise DataError("the chat template is nested too deeply") from error

    def render(**values: Any) -> Rendered:
        try:
            counter.begin(values)
            return _cut_marks(template.render(tools=None, documents=None, **values))
        except (jinja.TemplateError, *FAILURES) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the chat template does not render: {reason}") from None

    return render, content


START, END = "\ue000\ufdd0", "\ue000\ufdd1"  # around generated text: code points that Unicode keeps free of text


def _cut_marks(text: str) -> Rendered:
    """The text without the marks, and where what they enclosed lies."""
    whole, generated = "", []
    for number, part in enumerate(text.split(START)):
        inner, _, rest = part.partition(END) if number else ("", "", part)
        if number:
            generated.append((len(whole), len(whole) + len(inner)))
        whole += inner + rest
    return Rendered(whole, generated)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _content_rule(tree: Any, nodes: Any) -> Callable[[Any], Any]:
    """Content that the template does not look at closely is handed over as text: nothing for null, parts joined.

    Raises ValueError for parts that are no text.
    """
    tests = {test.name for test in tree.find_all(nodes.Test)}
    nulls = "none" in tests or any(each.value is None for each in tree.find_all(nodes.Const))
    loops = any(_is_content(part, nodes) for each in tree.find_all(nodes.For) for part in _all(each.iter, nodes))
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
    raise ValueError(f"a message's content has a part of type {kind!r}, of which this template makes no text")
