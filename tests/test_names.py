"""One name for each module and each public class, so that a name says which one is meant."""

from __future__ import annotations

import ast
import importlib
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1] / "castalia"
SHARED = {"__init__", "__main__", "read", "write", "names"}  # the last three: of each format's folder


def test_no_two_modules_have_one_name() -> None:
    places = defaultdict(list)
    for path in ROOT.rglob("*.py"):
        if path.stem not in SHARED and path.parent.name != "cli":  # a verb's file is called as what it calls
            places[path.stem].append(path)
    assert not [paths for paths in places.values() if len(paths) > 1]


def test_no_two_public_classes_have_one_name() -> None:
    places = defaultdict(list)
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(path)
    assert len(places) > 150
    assert not {name: paths for name, paths in places.items() if len(paths) > 1}


def test_benchmarks_and_examples_import_what_is_there() -> None:
    """Most of them run by hand, rarely, and mypy does not check them."""
    names = set()
    for path in [*ROOT.parent.glob("benchmarks/*.py"), *ROOT.parent.glob("examples/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "castalia":
                names |= {(path.name, node.module, alias.name) for alias in node.names}
    assert len(names) > 100
    assert not [name for name in sorted(names) if not _is_there(*name[1:])]


def _is_there(module: str, name: str) -> bool:
    found = importlib.import_module(module)
    return hasattr(found, name) or (hasattr(found, "__path__") and find_spec(f"{module}.{name}") is not None)
