"""Bounds of time and size for templates from anywhere.

Each loop, macro, operation, filter, test, call, comparison and literal of a template goes through one counter: before
it is done (what it could make at most) and afterwards (what it made). No clock is read: a template that renders on one
machine renders on all. The bounds grow with the conversation.
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

MAX_STEPS = 50_000  # of one rendering, and 20 for each character that it is given
MAX_CHARACTERS = 10_000_000  # put out or made on the way, and 100 for each that it is given
MAX_BITS = 16_384  # of a whole number: Python writes none out that is much larger
MAX_EXPONENT = 1_000
REMEMBERED = 64  # sizes of larger containers are kept, so that none is measured twice
CHARACTERS_A_STEP = 256  # which Python's own methods look at in the time of a step ...
FILTERED_A_STEP = 4  # ... and Jinja's slowest filters
MEASURED_A_STEP = 4  # values in a container, whose sizes are added up

FORMATS = {"format", "format_map", "%", "strftime_now"}  # their texts hold widths
SURFACE = frozenset(  # they look at no more than a value's surface
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
LINEAR = SURFACE | frozenset(  # what they make is no larger than what they are given
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
    """What a rendering has used."""

    def __init__(self) -> None:
        self.begin({})

    def begin(self, given: Mapping[str, Any]) -> None:
        self.known: dict[int, tuple[Any, int]] = {}  # by id; the value is kept, so that its id stays its own
        self.steps, self.max_steps, self.max_characters = 0, sys.maxsize, sys.maxsize
        size = self.size(given)
        self.steps = self.characters = 0
        self.max_steps, self.max_characters = MAX_STEPS + 20 * size, MAX_CHARACTERS + 100 * size

    def step(self, number: int = 1) -> None:
        self.steps += number
        if self.steps > self.max_steps:
            raise ValueError(f"it takes more than {self.max_steps:,} steps")

    def put(self, value: Any) -> Any:
        """Count what was made or is put out."""
        if isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise ValueError(f"it makes a number of more than {MAX_BITS:,} bits")
            return value
        self.characters += self.size(value)
        self.within(self.characters)
        return value

    def within(self, size: float) -> None:
        if size > self.max_characters:
            raise ValueError(f"it makes more than {self.max_characters:,} characters")

    def before(self, name: str, values: tuple[Any, ...], characters_a_step: int = CHARACTERS_A_STEP) -> None:
        """Count an operation, and refuse one that could make too much."""
        if name in SURFACE:
            return self.step()
        sizes = [self.size(value) for value in values]
        self.step(1 + sum(sizes) // characters_a_step)
        if name in LINEAR or not any(isinstance(value, str | bytes | list | tuple | dict) for value in values):
            return None
        numbers: list[float] = [abs(value) for value in values if type(value) is int and abs(value) > 1]
        if name in FORMATS:
            texts = [value for value in values if isinstance(value, str | bytes)]
            text = "".join(each if isinstance(each, str) else each.decode("latin-1") for each in texts)
            numbers = [*(numbers if "*" in text or re.search(r"\{[^}]*\{", text) else ()), _largest(text)]
        if name != "+":
            self.within(math.prod(numbers) * math.prod(sizes))
        return None

    def power(self, base: Any, exponent: Any) -> None:
        small = isinstance(exponent, int | float) and abs(exponent) <= MAX_EXPONENT
        if not small or (isinstance(base, int) and base.bit_length() * abs(exponent) > 2 * MAX_BITS):
            raise ValueError(f"a power of more than {MAX_EXPONENT}, or of too large a number")

    def size(self, value: Any) -> int:
        """Characters of a text; those within a container, and one for each value. Counting ends above the bound."""
        if isinstance(value, str | bytes):
            return len(value) + 1
        inner = value._Namespace__attrs if type(value).__name__ == "Namespace" else value
        if not isinstance(inner, list | tuple | dict | set | frozenset | type({}.items()) | type({}.values())):
            return 1
        if id(value) in self.known:
            return self.known[id(value)][1]
        self.step(1 + len(inner) // MEASURED_A_STEP)
        total = 1
        for each in inner.items() if isinstance(inner, dict) else inner:
            total += self.size(each)
            self.within(total)
        if total > REMEMBERED and inner is value:  # a namespace changes
            self.known[id(value)] = value, total
        return total


def _largest(text: str) -> float:
    return max((float(digits) for digits in re.findall(r"\d+", text)), default=1) or 1


def bounded_environment(counter: Counter) -> type[Any]:
    """Jinja's sandbox, in which every operation is counted. Its trees must go through `count_nodes`."""
    sandbox = import_module("jinja2.sandbox")

    class Bounded(sandbox.ImmutableSandboxedEnvironment):  # type: ignore[name-defined]
        intercepted_binops = frozenset(("+", "*", "**", "%"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            counter.before(operator, (left, right))
            if operator == "**":
                counter.power(left, right)
            return counter.put(super().call_binop(context, operator, left, right))

        def call(__self, __context: Any, __called: Any, *arguments: Any, **options: Any) -> Any:  # noqa: N805
            if getattr(__called, "__self__", None) is __self:  # one of those below
                return __called(*arguments)  # without what Jinja tells macros of the loop around them
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
    """A filter or test whose use is counted, and that takes no size beyond the bound."""
    passed = int(hasattr(given, "jinja_pass_arg"))  # the environment or the context comes first
    cost = CHARACTERS_A_STEP if name in LINEAR else FILTERED_A_STEP

    @wraps(given)  # keeps the marks by which Jinja knows what to hand over
    def bounded(*arguments: Any, **options: Any) -> Any:
        counter.before(name, (*arguments[passed:], *options.values()), cost)
        return counter.put(given(*arguments, **options))

    return bounded


def count_nodes(tree: Any) -> Any:
    """The tree with what has no hook of its own as calls of the environment, whose names no template can take."""
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
            rest = [each for operand in node.ops for each in (nodes.Const(operand.op), operand.expr)]
            return called("compared", [node.expr, *rest], node.lineno)

        def _built(self, node: Any) -> Any:
            node = self.generic_visit(node)
            made = getattr(node, "ctx", "load") == "load"
            return called("built", [node], node.lineno) if made else node

        visit_List = visit_Dict = visit_Tuple = _built

        def visit_Getitem(self, node: Any) -> Any:
            return self._built(node) if isinstance(node.arg, nodes.Slice) else self.generic_visit(node)

    return Count().visit(tree)
