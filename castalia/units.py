"""Durations, sizes, large numbers and what is counted as a person reads them: the one place that words them."""

from __future__ import annotations

import math
import re

from castalia.errors import ConfigError

GiB = 2**30
SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def duration(seconds: float) -> str:
    """Seconds with three digits, in the largest unit of which there are two: 0.023 ms, 0.865 s, 45 s, 12.5 min, 3.5 h.

    A busy step and a whole run are written alike, so that figures of different verbs can be compared.
    """
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{_three_digits(seconds / size)} {unit}"
    if 0 < seconds < 1e-3:
        return f"{_three_digits(seconds * 1e3)} ms"
    return f"{_three_digits(seconds)} s"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def short_number(number: float) -> str:
    """A number with four digits: 20.55B, 162.5M, 12.35K; below 10,000 written out: 9,999."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= max(0.99995 * size, 1e4):  # 999,960 are 1M, not 1000k
            return f"{number / size:.4g}{unit}"
    return f"{number:,.0f}"


def memory_size(size: float) -> str:
    """Bytes of memory as KiB, MiB or GiB, as devices are sold by."""
    if size < 2**20:
        return f"{size / 2**10:.1f} KiB"
    return f"{size / GiB:,.2f} GiB" if size >= 0.1 * GiB else f"{size / 2**20:.1f} MiB"


def file_size(size: float) -> str:
    """Bytes of files, and of what is read from them, as 12.3 MB: in powers of 1000, as disks are sold by."""
    exponent = min(3, int(math.log10(max(size, 1))) // 3)
    return f"{size / 1000**exponent:.4g} {('B', 'KB', 'MB', 'GB')[exponent]}"


def parse_size(text: str, option: str) -> int:
    """Bytes of `4GB`, `1.5 GiB` or `800M`. Raises ConfigError, which names the option, for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    if not match or not (number := int(float(match[1]) * SIZES[match[2] or ""])):
        raise ConfigError(f"{option} {text}: write an amount such as 4GB, 1.5GiB or 800MB")
    return number


def plural(number: int, noun: str) -> str:
    """A number and what it counts, whose plural ends in s: "1 note", "2,000 notes"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
