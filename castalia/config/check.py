"""Contradictions between values of one config, all reported at once."""

from __future__ import annotations

from castalia.config.read import Findings
from castalia.config.schema import RunConfig


def check(config: RunConfig, origins: dict[str, str], found: Findings) -> None:
    """Add an error for each contradiction and a note for each value that will surprise."""
