"""The texts of all errors in the package, read from its source; what is filled in stands as `{}`."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "castalia"


def error_texts() -> list[str]:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    functions: dict[str, list[ast.FunctionDef]] = defaultdict(list)
    for node in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        functions[node.name].append(node)
    tables = [
        node
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.Assign) and {"REASONS", "REFUSED"} & {ast.unparse(target) for target in node.targets}
    ]
    found: set[str] = {text for table in tables for text in _literals(table)}
    seen: set[ast.AST] = set()
    for function in [each for same in functions.values() for each in same]:
        for place in filter(_says_an_error, ast.walk(function)):
            found.update(_texts(place, function, functions, seen))
    return sorted({text.replace("\n", "\\n") for text in found if " " in text.strip()})


def _says_an_error(node: ast.AST) -> bool:
    """`raise ...`, `Problem(...)`, `SomeError(...)`, `x.errors.append(...)`, `x.errors += ...`, `yield f"..."`."""
    if isinstance(node, ast.Raise):
        return True
    if isinstance(node, ast.Yield):
        return isinstance(node.value, ast.JoinedStr)
    if isinstance(node, ast.AugAssign):
        return ast.unparse(node.target).endswith(("errors", "missing", "problems"))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        name = ast.unparse(node.func)
        return name.endswith(("Error", "Problem", "errors.append", "missing.append"))
    return False


def _texts(
    place: ast.AST, inside: ast.FunctionDef, functions: dict[str, list[ast.FunctionDef]], seen: set[ast.AST]
) -> Iterator[str]:
    """All texts below `place`, what its names were assigned in the function, and what is called gives."""
    if place in seen:
        return
    seen.add(place)
    yield from _literals(place)
    names = {node.id for node in ast.walk(place) if isinstance(node, ast.Name)}
    for node in ast.walk(inside):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if _assigns(node) else []
        if any(isinstance(each, ast.Name) and each.id in names for target in targets for each in ast.walk(target)):
            yield from _literals(node)
    for function in [each for name in names & functions.keys() for each in functions[name]]:
        for node in ast.walk(function):
            if isinstance(node, ast.Return | ast.Yield) and node.value is not None:
                yield from _texts(node.value, function, functions, seen)


def _assigns(node: ast.AST) -> bool:
    return isinstance(node, ast.AugAssign | ast.NamedExpr | ast.AnnAssign)


def _literals(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                yield from _literals(part.value)
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            yield node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from _literals(child)
