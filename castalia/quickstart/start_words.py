"""What `castalia start` is given, checked before anything long begins and before torch is imported."""

from __future__ import annotations

import re

from castalia.config.load import load_config
from castalia.errors import ConfigError
from castalia.quickstart.family import architecture


def check_words(words: list[str]) -> None:
    """Raises ConfigError for settings that there are none of, before anything long begins."""
    model = architecture(2, 64, 512, 256)  # any will do: only the words are checked
    del model["max_positions"]
    load_config([{"model": model}], words, any_batch=True)


def parameters_of(size: str | None, hours: float | None) -> float | None:
    """`5M` as a number."""
    if size is None:
        return None
    if hours is not None:
        raise ConfigError("--hours and --size exclude each other: the one follows from the other")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMbB]?)", size)
    if not match or not float(match[1]):
        raise ConfigError(f"--size {size}: give a number of parameters such as 800k, 5M or 1.2B")
    return float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()]
