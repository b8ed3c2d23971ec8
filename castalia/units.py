"""Durations, large numbers and what is counted as a person reads them: the one place that words them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Seconds with three digits, in the largest unit of which there are two: 0.865 s, 45 s, 12.5 min, 3.5 h, 2.1 days.

    A busy step and a whole run are written alike, so that figures of different verbs can be compared.
    """
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{_three_digits(seconds / size)} {unit}"
    return f"{_three_digits(seconds)} s"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def short_number(number: float) -> str:
    """A number with four digits: 20.55B, 162.5M, 12.35K; below 10,000 written out: 9,999."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= max(0.99995 * size, 1e4):  # 999,960 are 1M, not 1000k
            return f"{number / size:.4g}{unit}"
    return f"{number:,.0f}"


def plural(number: int, noun: str) -> str:
    """A number and what it counts, whose plural ends in s: "1 note", "2,000 notes"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
