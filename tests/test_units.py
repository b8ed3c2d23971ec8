"""Durations and numbers in words."""

from __future__ import annotations

import pytest

from castalia.errors import ConfigError
from castalia.units import duration, parse_size, plural, short_number

DURATIONS = [
    (2.3e-5, "0.023 ms"),
    (0.0, "0 s"), (0.8645, "0.865 s"), (45, "45 s"), (119, "119 s"), (150, "2.5 min"), (5985, "99.8 min"),
    (7100, "118 min"), (3.5 * 3600, "3.5 h"), (2.1 * 86400, "2.1 days"), (2395.5 * 86400, "2,396 days"),
]  # fmt: skip
NUMBERS = [
    (7, "7"), (9_999, "9,999"), (12_345, "12.35K"), (999_960, "1M"), (162_519_552, "162.5M"),
    (20_554_567_680, "20.55B"), (3e12, "3T"),
]  # fmt: skip


@pytest.mark.parametrize(("seconds", "text"), DURATIONS)
def test_durations_have_units_that_suit_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), NUMBERS)
def test_large_numbers_are_short(number: float, text: str) -> None:
    assert short_number(number) == text


def test_only_one_is_singular():
    assert [plural(number, "note") for number in (0, 1, 2, 2000)] == ["0 notes", "1 note", "2 notes", "2,000 notes"]


@pytest.mark.parametrize(
    ("text", "number"),
    [("4GB", 4 * 10**9), ("1.5 GiB", 3 << 29), ("800m", 8 * 10**8), ("123", 123), ("2T", 2 * 10**12)],
)
def test_sizes_are_read(text, number):
    assert parse_size(text, "--memory") == number


@pytest.mark.parametrize("text", ["", "GB", "-4GB", "4 GB please", "0", "4KBB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="write an amount"):
        parse_size(text, "--memory")
