"""One name for each module and each public class, so that a name says which one is meant."""

from __future__ import annotations

import ast
from collections import defaultdict
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
