"""What the code uses of torch, and what each supported version of torch has of it.

    python tests/torch_names.py --write    the table of the installed version: tests/fixtures/torch/VERSION.json

A table maps every name of torch that `castalia` and `benchmarks` use to the parameters that it takes, or to null where
nothing says them. `make test-torch` writes it; tests compare all tables with the code.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "tests" / "fixtures" / "torch"
STUBS = ("_C/_VariableFunctions.pyi", "nn/functional.pyi", "_C/_nn.pyi", "_C/_distributed_c10d.pyi", "_C/__init__.pyi")

Parameters = list[str] | None  # `**` stands for any; None where neither a signature nor a stub tells


def used_names() -> dict[str, set[str]]:
    """Every dotted name of torch in the code, with the keywords that it is called with."""
    used: dict[str, set[str]] = defaultdict(set)
    for folder in ("castalia", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name, keywords in names_in(ast.parse(path.read_text())):
                used[name] |= keywords
    return used


def names_in(tree: ast.Module) -> Iterator[tuple[str, set[str]]]:
    """Dotted names of torch, whatever the module calls them, each with the keywords of one use."""
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            ours = [name for name in node.names if name.name.split(".")[0] == "torch"]
            imported |= {name.asname or "torch": name.name if name.asname else "torch" for name in ours}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            imported |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    yield from ((name, set()) for name in imported.values())
    inner = set()  # parts of longer names
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (name := _dotted(node.func, imported)):
            yield name, {keyword.arg for keyword in node.keywords if keyword.arg}
        if isinstance(node, ast.Attribute) and node not in inner:
            inner |= set(ast.walk(node)) - {node}
            if name := _dotted(node, imported):
                yield name, set()


def _dotted(node: ast.expr, imported: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return imported.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := _dotted(node.value, imported)):
        return f"{owner}.{node.attr}"
    return None


def find(name: str) -> Any:
    """What the installed torch has under a dotted name. Raises AttributeError where there is nothing."""
    found: Any = import_module("torch")
    path = "torch"
    for part in name.split(".")[1:]:
        path = f"{path}.{part}"
        if not hasattr(found, part) and inspect.ismodule(found):
            try:
                import_module(path)
            except ModuleNotFoundError:
                raise AttributeError(path) from None
        found = getattr(found, part)
    return found


def parameters(name: str) -> Parameters:
    """What can be given to a name of the installed torch. Raises AttributeError where it has no such name."""
    found = find(name)
    if not callable(found):
        return None
    try:
        taken = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return _parameters_in_stubs(name.split(".")[-1])
    if any(p.kind is p.VAR_KEYWORD for p in taken):
        return ["**"]
    return sorted(p.name for p in taken if p.kind is not p.VAR_POSITIONAL)


@cache
def _stubs() -> dict[str, set[str]]:
    root = Path(import_module("torch").__file__ or "").parent
    known: dict[str, set[str]] = {}
    for stub in STUBS:
        if not (root / stub).exists():
            continue
        here: dict[str, set[str]] = defaultdict(set)
        for node in ast.parse((root / stub).read_text()).body:
            if isinstance(node, ast.FunctionDef):
                here[node.name] |= {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
        known |= {name: taken for name, taken in here.items() if name not in known}
    return known


def _parameters_in_stubs(name: str) -> Parameters:
    return sorted(_stubs()[name]) if name in _stubs() else None


def lacking(used: dict[str, set[str]], table: dict[str, Parameters]) -> list[str]:
    """What the code uses and the table's version has not."""
    problems = [name for name in used if name not in table]
    for name in sorted(used.keys() & table.keys()):
        taken = table[name]
        if taken is not None and "**" not in taken:
            problems += [f"{name}({keyword}=)" for keyword in sorted(used[name] - set(taken))]
    return sorted(problems)


def table() -> dict[str, Parameters]:
    """The installed version's."""
    found = {}
    for name in sorted(used_names()):
        try:
            found[name] = parameters(name)
        except AttributeError:
            print(f"torch {import_module('torch').__version__} has no {name}", file=sys.stderr)
    return found


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    TABLES.mkdir(parents=True, exist_ok=True)
    version = import_module("torch").__version__.split("+")[0]
    rows = [f" {json.dumps(name)}: {json.dumps(taken)}" for name, taken in table().items()]
    (TABLES / f"{version}.json").write_text("{\n" + ",\n".join(rows) + "\n}\n")
    print(f"{len(rows)} names of torch {version}: {TABLES / f'{version}.json'}")
