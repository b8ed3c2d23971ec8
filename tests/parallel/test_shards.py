"""Sharded tensors belong to this room; elsewhere they are looked at through an executor's `part` and `local`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "castalia"
MODULES = ("torch.distributed.tensor", "torch.distributed.device_mesh", "torch.distributed.fsdp")
ATTRIBUTES = {"_local_tensor", "to_local", "full_tensor", "redistribute", "placements", "device_mesh"}


def sharding(source: str) -> Iterator[str]:
    """Everything in a file's source that concerns sharded tensors."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith(MODULES))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(MODULES):
            yield node.module or ""
        elif isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in ATTRIBUTES:
            yield node.value  # as getattr's argument


def test_no_other_room_handles_sharded_tensors():
    files = [path for path in PACKAGE.rglob("*.py") if PACKAGE / "parallel" not in path.parents]
    uses = {str(path): names for path in files if (names := [*sharding(path.read_text(encoding="utf-8"))])}
    assert uses == {}
    inside = (PACKAGE / "parallel" / "shards.py").read_text(encoding="utf-8")
    assert {"torch.distributed.tensor", "to_local", "placements"} <= {*sharding(inside)}
