"""Chat templates in Jinja, as `transformers` renders them, but within bounds of time and size.

Of a template from anywhere each run of a loop or macro and each character that it puts out is counted.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from importlib import import_module
from typing import Any, NamedTuple

from castalia.errors import DataError

MAX_RUNS = 1_000_000  # of loops and macros, in one conversation
MAX_CHARACTERS = 10_000_000  # put out, or made by one operation
MAX_EXPONENT = 1_000
FAILURES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError)


class Rendered(NamedTuple):
    text: str
    generated: list[
        tuple[int, int]
    ]  # characters from, to: what stands between {% generation %} and {% endgeneration %}


class _Counter:
    """What a rendering has used."""

    def __init__(self) -> None:
        self.runs = self.characters = 0

    def run(self, *_: Any) -> str:
        self.runs += 1
        if self.runs > MAX_RUNS:
            raise ValueError(f"it goes through its loops more than {MAX_RUNS:,} times")
        return ""

    def put(self, value: Any) -> Any:
        if isinstance(value, str):
            self.characters += len(value)
            _bounded(self.characters)
        return value


def _bounded(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise ValueError(f"it makes more than {MAX_CHARACTERS:,} characters")


def compile_template(source: str) -> tuple[Callable[..., Rendered], Callable[[Any], Any]]:
    """How conversations are rendered with the template (`messages=` and so on), and how its messages' content must be.

    DataError if it is no Jinja; the renderer raises ValueError, in one line, for what does not render.
    """
    jinja, sandbox = import_module("jinja2"), import_module("jinja2.sandbox")
    nodes, extensions = import_module("jinja2.nodes"), import_module("jinja2.ext")
    counter = _Counter()

    class Bounded(sandbox.ImmutableSandboxedEnvironment):  # type: ignore[name-defined]
        intercepted_binops = frozenset(("+", "*", "**", "%"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operands(operator, left, right)
            result = super().call_binop(context, operator, left, right)
            return counter.put(result) if isinstance(result, str) else result

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

    environment = Bounded(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        finalize=counter.put,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    environment.filters = {name: _counted(each, counter) for name, each in environment.filters.items()}
    environment.filters["tojson"] = _counted(_to_json, counter)
    environment.globals |= {"strftime_now": lambda form: datetime.now().strftime(form), "_run": counter.run}

    def refuse(message: str) -> None:
        raise jinja.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    try:
        tree = environment.parse(source)
        content = _content_rule(tree, nodes)
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            node.body.insert(0, nodes.Output([nodes.Call(nodes.Name("_run", "load"), [], [], None, None)]))
        code = environment.compile(tree)
        template = environment.template_class.from_code(environment, code, environment.make_globals(None))
    except jinja.TemplateSyntaxError as error:
        raise DataError(f"the chat template is no Jinja: line {error.lineno}: {error.message}") from error
    except RecursionError as error:
        raise DataError("the chat template is nested too deeply") from error

    def render(**values: Any) -> Rendered:
        counter.__init__()  # type: ignore[misc]
        try:
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


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if operator == "**" and isinstance(right, int | float) and abs(right) > MAX_EXPONENT:
        raise ValueError(f"a power of more than {MAX_EXPONENT}")
    for one, other in ((left, right), (right, left)):
        if operator == "*" and isinstance(one, str | list | tuple) and isinstance(other, int):
            _bounded(len(one) * other)
    if operator == "%" and isinstance(left, str) and any(len(digits) > 5 for digits in _numbers(left)):
        _bounded(MAX_CHARACTERS + 1)


def _numbers(text: str) -> list[str]:
    return "".join(character if character.isdigit() else " " for character in text).split()


def _counted(given: Callable[..., Any], counter: _Counter) -> Callable[..., Any]:
    """A filter whose result is counted, and that takes no size beyond the bound."""

    @functools.wraps(given)  # keeps the marks by which Jinja knows what to hand over
    def bounded(*arguments: Any, **options: Any) -> Any:
        for value in (*arguments[1:], *options.values()):
            if isinstance(value, int):
                _bounded(value)
        return counter.put(given(*arguments, **options))

    return bounded


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
