"""A choice in words says the same as its figures."""

from collections import Counter
from pathlib import Path

from castalia.quickstart.choose import Pace, choose
from castalia.quickstart.explain import about_choice, about_loss
from castalia.quickstart.look import Folder


def told(num_bytes, **asked):
    folder = Folder(Path("mine"), {}, Counter(), Counter(), num_bytes, 1, xz_bits_per_byte=2.0)
    chosen, twice = (
        choose(num_bytes, Pace(1e-6, 1e11), 8 << 30, **{name: each * (factor if name == "seconds" else 1)
               for name, each in asked.items()})
        for factor in (1, 2)
    )  # fmt: skip
    rows = [*about_choice(chosen, "cpu"), *about_loss(chosen, twice if "seconds" in asked else None, folder)]
    return chosen, "\n".join(f"{name} {text}" for name, text in rows)


def test_a_text_that_is_used_up_before_the_time_is_said_loudly():
    chosen, text = told(100_000, seconds=86400)
    assert chosen.limit == "text"
    assert "BEFORE THE TIME IS OVER" in text and "more text would help" in text


def test_a_time_that_is_too_short_for_the_text_says_what_more_would_give():
    chosen, text = told(10**9, seconds=300)
    assert chosen.limit == "time"
    assert "STOPS" not in text and "twice the time" in text and "more text would help" not in text
    assert f"{chosen.steps:,} steps" in text and f"{chosen.bits_per_byte:.2f} bits" in text


def test_a_size_speaks_of_no_time_that_was_asked_for():
    _, text = told(100_000, size=5e6)
    assert "nearest the size" in text
    assert "time is over" not in text.lower() and "twice" not in text
