"""Bounds of time and size for chat templates, which may come from untrusted sources.

Each loop, macro, operation, filter, test, call, comparison and literal of a template is counted twice: before it runs
(by the size of the largest result that it could have) and afterwards (by the size of its result). No clock is read, so
a template that renders on one machine renders on all. The bounds grow with the size of the conversation.
"""

from __future__ import annotations

import math
import operator
import re
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from typing import Any

MAX_STEPS = 50_000  # of one rendering, plus 20 for each character of the conversation
MAX_CHARACTERS = 10_000_000  # of output and intermediate results, plus 100 for each character of the conversation
MAX_BITS = 16_384  # of an integer; Python refuses to print much larger ones
MAX_EXPONENT = 1_000
REMEMBERED = 64  # sizes of larger containers are remembered, so that none is measured twice
CHARACTERS_A_STEP = 256  # characters that methods of Python process in the time of one step ...
FILTERED_A_STEP = 4  # ... and the slowest filters of Jinja
MEASURED_A_STEP = 4  # values of a container whose sizes are added in the time of one step

FORMATS = {"format", "format_map", "%", "strftime_now"}  # their arguments may ask for a large width
SURFACE = frozenset(  # operations whose time does not depend on the size of the value
    [
        "length",
        "count",
        "first",
        "last",
        "default",
        "d",
        "defined",
        "undefined",
        "string",
        "number",
        "integer",
        "float",
        "boolean",
        "mapping",
        "iterable",
        "sequence",
        "none",
        "true",
        "false",
        "callable",
        "odd",
        "even",
        "divisibleby",
        "get",
        "items",
        "keys",
        "values",
        "attr",
        "sameas",
    ]
)
LINEAR = SURFACE | frozenset(  # operations whose result is no larger than their arguments
    [
        "split",
        "rsplit",
        "splitlines",
        "strip",
        "lstrip",
        "rstrip",
        "trim",
        "startswith",
        "endswith",
        "find",
        "rfind",
        "index",
        "partition",
        "rpartition",
        "upper",
        "lower",
        "removeprefix",
        "removesuffix",
        "list",
        "string",
        "tojson",
        "round",
        "int",
        "abs",
        "float",
        "in",
        "eq",
        "ne",
        "lt",
        "gt",
        "le",
        "ge",
        "==",
        "!=",
        "<",
        ">",
        "<=",
        ">=",
    ]
)
COMPARISONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "gteq": operator.ge,
    "lt": operator.lt,
    "lteq": operator.le,
    "in": lambda left, right: left in right,
    "notin": lambda left, right: left not in right,
}


class Counter:
    """The steps and characters that a rendering has used. Its methods raise ValueError beyond the bounds."""

    def __init__(self) -> None:
        self.begin({})

    def begin(self, given: Mapping[str, Any]) -> None:
        """Reset for a rendering, with bounds by the size of its variables."""
        self.known: dict[int, tuple[Any, int]] = {}  # sizes by id; the value is kept so that its id is not reused
        self.steps, self.max_steps, self.max_characters = 0, sys.maxsize, sys.maxsize
        size = self.size(given)
        self.steps = self.characters = 0
        self.max_steps, self.max_characters = MAX_STEPS + 20 * size, MAX_CHARACTERS + 100 * size

    def step(self, number: int = 1) -> None:
        """Count steps."""
        self.steps += number
        if self.steps > self.max_steps:
            raise ValueError(f"it takes more than {self.max_steps:,} steps")

    def put(self, value: Any) -> Any:
        """Count the size of a result or of output, and return the value."""
        if isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise ValueError(f"it makes a number of more than {MAX_BITS:,} bits")
            return value
        self.characters += self.size(value)
        self.within(self.characters)
        return value

    def within(self, size: float) -> None:
        """Refuse a result of more characters than the bound."""
        if size > self.max_characters:
            raise ValueError(f"it makes more than {self.max_characters:,} characters")

    def before(self, name: str, values: tuple[Any, ...], characters_a_step: int = CHARACTERS_A_STEP) -> None:
        """Count an operation, and refuse it if its result could be too large."""
        if name in SURFACE:
            return self.step()
        sizes = [self.size(value) for value in values]
        self.step(1 + sum(sizes) // characters_a_step)
        if name in LINEAR or not any(isinstance(value, str | bytes | list | tuple | dict) for value in values):
            return None
        numbers: list[float] = [abs(value) for value in values if type(value) is int and abs(value) > 1]
        if name in FORMATS:
            texts = [value for value in values if isinstance(value, str | bytes)]
            text = "".join(part if isinstance(part, str) else part.decode("latin-1") for part in texts)
            numbers = [*(numbers if "*" in text or re.search(r"\{[^}]*\{", text) else ()), _largest(text)]
        if name != "+":
            self.within(math.prod(numbers) * math.prod(sizes))
        return None

    def power(self, base: Any, exponent: Any) -> None:
        """Refuse a power that would be too large."""
        small = isinstance(exponent, int | float) and abs(exponent) <= MAX_EXPONENT
        if not small or (isinstance(base, int) and base.bit_length() * abs(exponent) > 2 * MAX_BITS):
            raise ValueError(f"a power of more than {MAX_EXPONENT}, or of too large a number")

    def size(self, value: Any) -> int:
        """The characters of a value and of all values inside it, plus one for each. Counting stops at the bound."""
        if isinstance(value, str | bytes):
            return len(value) + 1
        inner = value._Namespace__attrs if type(value).__name__ == "Namespace" else value
        if not isinstance(inner, list | tuple | dict | set | frozenset | type({}.items()) | type({}.values())):
            return 1
        if id(value) in self.known:
            return self.known[id(value)][1]
        self.step(1 + len(inner) // MEASURED_A_STEP)
        total = 1
        for element in inner.items() if isinstance(inner, dict) else inner:
            total += self.size(element)
            self.within(total)
        if total > REMEMBERED and inner is value:  # but not of a namespace, which can change
            self.known[id(value)] = value, total
        return total


def _largest(text: str) -> float:
    return max((float(digits) for digits in re.findall(r"\d+", text)), default=1) or 1


def bounded_environment(counter: Counter) -> type[Any]:
    """Jinja's sandbox with every operation counted. Trees must go through `count_nodes` before they are compiled."""
    sandbox = import_module("jinja2.sandbox")

    class Bounded(sandbox.ImmutableSandboxedEnvironment):  # type: ignore[name-defined]
        intercepted_binops = frozenset(("+", "*", "**", "%"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            counter.before(operator, (left, right))
            if operator == "**":
                counter.power(left, right)
            return counter.put(super().call_binop(context, operator, left, right))

        def call(__self, __context: Any, __called: Any, *arguments: Any, **options: Any) -> Any:  # noqa: N805
            if getattr(__called, "__self__", None) is __self:  # one of the methods below
                return __called(*arguments)  # without the context that Jinja passes to macros
            name = getattr(__called, "__name__", "")
            receiver = getattr(getattr(__called, "__wrapped__", __called), "__self__", None)
            if name in FORMATS or isinstance(receiver, str | bytes | int | list | tuple | dict):
                counter.before(name, (receiver, *arguments, *options.values()))
            else:
                counter.step()
            return counter.put(super().call(__context, __called, *arguments, **options))

        def run(self) -> str:
            counter.step()
            return ""

        def literal(self, value: Any) -> Any:
            return value

        def built(self, value: Any) -> Any:
            counter.step()
            return counter.put(value)

        def joined(self, *values: Any) -> Any:
            counter.step(len(values))
            return counter.put("".join(str(counter.put(value)) for value in values))

        def compared(self, first: Any, *rest: Any) -> Any:
            result: Any = True
            for name, value in zip(rest[::2], rest[1::2], strict=True):
                counter.before("==", (first, value))
                result = COMPARISONS[name](first, value)
                if not result:
                    return result
                first = value
            return result

    return Bounded


def counted(name: str, given: Callable[..., Any], counter: Counter) -> Callable[..., Any]:
    """A filter or test that counts its use, and refuses arguments whose result could be too large."""
    passed = int(hasattr(given, "jinja_pass_arg"))  # Jinja passes it the environment or the context first
    cost = CHARACTERS_A_STEP if name in LINEAR else FILTERED_A_STEP

    @wraps(given)  # keeps the attributes by which Jinja knows what to pass
    def bounded(*arguments: Any, **options: Any) -> Any:
        counter.before(name, (*arguments[passed:], *options.values()), cost)
        return counter.put(given(*arguments, **options))

    return bounded


def count_nodes(tree: Any) -> Any:
    """A syntax tree in which operations without a hook of their own call methods of the environment.

    The names of these methods are out of reach of templates.
    """
    nodes, visitor = import_module("jinja2.nodes"), import_module("jinja2.visitor")

    def called(name: str, values: list[Any], line: int) -> Any:
        return nodes.Call(nodes.EnvironmentAttribute(name), values, [], None, None).set_lineno(line)

    class Count(visitor.NodeTransformer):  # type: ignore[name-defined]
        def _counted_body(self, node: Any) -> Any:
            node = self.generic_visit(node)
            node.body.insert(0, nodes.Output([called("run", [], node.lineno)]).set_lineno(node.lineno))
            return node

        visit_For = visit_Macro = visit_CallBlock = visit_Block = _counted_body

        def visit_TemplateData(self, node: Any) -> Any:
            return called("literal", [nodes.Const(node.data)], node.lineno)

        def visit_Concat(self, node: Any) -> Any:
            return called("joined", self.generic_visit(node).nodes, node.lineno)

        def visit_Compare(self, node: Any) -> Any:
            node = self.generic_visit(node)
            rest = [item for operand in node.ops for item in (nodes.Const(operand.op), operand.expr)]
            return called("compared", [node.expr, *rest], node.lineno)

        def _built(self, node: Any) -> Any:
            node = self.generic_visit(node)
            made = getattr(node, "ctx", "load") == "load"
            return called("built", [node], node.lineno) if made else node

        visit_List = visit_Dict = visit_Tuple = _built

        def visit_Getitem(self, node: Any) -> Any:
            return self._built(node) if isinstance(node.arg, nodes.Slice) else self.generic_visit(node)

    return Count().visit(tree)
