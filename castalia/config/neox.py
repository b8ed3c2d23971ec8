"""NeoX's configs, translated."""

from __future__ import annotations

from castalia.config.read import Findings
from castalia.config.settings import Setting

KEYS: dict[str, object] = {}


def is_neox(key: str, value: object) -> bool:
    return False


def translate(
    theirs: dict[str, Setting], ours: dict[str, Setting], num_files: int, found: Findings
) -> dict[str, Setting]:
    return {}
