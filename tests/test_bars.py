"""Bars of work that takes a while: on a terminal alone, beside that of the steps, and gone in the end."""

from __future__ import annotations

import io

from rich.console import Console

from castalia.bars import progress, unseen
from castalia.observe.display import Display


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_for_terminals():
    screen = Terminal()
    with progress(3, screen=screen) as advance:
        advance(1, "first")
        advance(2, "others [of all]")
    assert "others [of all]" in screen.getvalue() and "3/3" in screen.getvalue()
    with progress(3, screen=io.StringIO()) as advance:
        assert advance is unseen
    with progress(3, screen=screen, shown=False) as advance:
        assert advance is unseen


def test_evaluation_has_a_bar_beside_that_of_the_steps():
    screen = Terminal()
    with Display() as display:
        display.console = Console(file=screen, force_terminal=True, width=100)
        display.start(2, 10, 100)
        with display.working("evaluating", 4) as advance:
            for _ in range(3):
                advance(1)
            display.bar.refresh()
            assert [task.description for task in display.bar.tasks] == ["training", "evaluating"]
        assert [task.description for task in display.bar.tasks] == ["training"]
    assert "evaluating" in screen.getvalue() and "3/4" in screen.getvalue()
