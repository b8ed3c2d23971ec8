"""No line is too wide, and nothing of the text is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from castalia.wrapping import WIDTH, aligned, shortened, wrapped

WORDS = st.lists(st.text("abc", min_size=1, max_size=30), min_size=1, max_size=40).map(" ".join)


@given(WORDS, st.integers(0, 20))
def test_wrapped_lines_fit_and_hold_every_word(text, hang):
    lines = wrapped(text, hang).split("\n")
    assert all(len(line) <= WIDTH for line in lines)
    assert " ".join(lines).split() == text.split()
    assert all(line.startswith(" " * hang) for line in lines[1:])


@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=4))
def test_rows_fit_whatever_their_cells(rows):
    lines = aligned(rows)
    assert all(len(line) <= WIDTH for line in lines)
    assert sorted(" ".join(lines).split()) == sorted(" ".join(cell for row in rows for cell in row).split())


def test_what_fits_stays_as_it_is_and_paths_are_not_broken():
    path = "/" + "x" * WIDTH
    assert wrapped(f"in\n  {path}\nhere") == f"in\n  {path}\nhere"
    assert aligned([("a", "1"), ("long", "2")]) == ["  a     1", "  long  2"]
    assert aligned([]) == []
    assert shortened("x" * WIDTH) == "x" * WIDTH
    assert shortened("x, " * WIDTH).endswith("x ...") and len(shortened("x, " * WIDTH)) <= WIDTH
