"""Progress bars of work that takes a while."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

Tally = Callable[[int], None]  # called with the units that were done since the last call; an `Advance` is one


class Advance(Protocol):
    """Moves a progress bar on."""

    def __call__(self, done: int, text: str = "", total: int | None = None) -> None:
        """Add `done` units of work; change the text beside the bar and the number of units, where given."""


def unseen(done: int, text: str = "", total: int | None = None) -> None:
    """An `Advance` of a bar that nobody sees."""


@contextmanager
def progress(
    total: int | None = None, *, in_bytes: bool = False, shown: bool = True, screen: TextIO | None = None
) -> Iterator[Advance]:
    """A bar with the time left on standard error, where that is a terminal; gone when the work is done.

    `in_bytes`: the units are bytes, so that size and speed are shown as well. `screen`: in place of standard error.
    """
    screen = screen or sys.stderr
    if not (shown and screen.isatty()):
        yield unseen
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft
    from rich.progress import TransferSpeedColumn as Speed

    count = (DownloadColumn(), Speed()) if in_bytes else (MofNCompleteColumn(),)
    columns = (BarColumn(), *count, TimeLeft(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(file=screen), transient=True) as bar:
        task = bar.add_task("", total=total)

        def advance(done: int, text: str = "", total: int | None = None) -> None:
            bar.update(task, advance=done, description=text or None, total=total)

        yield advance
