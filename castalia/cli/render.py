"""What verbs show on a terminal: tables, a progress bar, sizes."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, TextIO

from castalia.wrapping import WIDTH, aligned, wrapped


class Advance(Protocol):
    """Moves a progress bar on."""

    def __call__(self, done: int, text: str = "", total: int | None = None) -> None:
        """Add `done` units of work; change the text beside the bar and the number of units, where given."""


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with borders on a terminal, aligned columns elsewhere. A header of empty strings is not shown."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left", show_header=any(header))
        for column, name in enumerate(header):
            numbers = all(row[column][:1].isdigit() for row in rows)
            table.add_column(name, justify="right" if numbers and any(header) else "left")
        for row in rows:
            table.add_row(*row)
        console = Console(markup=False)  # rich would read brackets in a cell as styles
        console.width = min(console.width, WIDTH)
        console.print(table)
        return
    say(f"{title}:")
    for line in aligned([header, *rows] if any(header) else rows):
        print(line)


def say(text: str, file: TextIO | None = None, hang: int = 2) -> None:
    """Print text for people on standard output or another stream; what is too long is wrapped, `hang` columns in."""
    print(wrapped(text, hang), file=file, flush=True)


def print_facts(rows: Sequence[tuple[str, str]]) -> None:
    """Names and texts in two columns, wrapped before the hundredth."""
    for name, text in rows:
        paragraphs = text.splitlines() or [""]
        lines = [line for paragraph in paragraphs for line in textwrap.wrap(paragraph, 84) or [""]]
        for number, line in enumerate(lines):
            print(f"{name if number == 0 else '':<15}{line}".rstrip(), flush=True)


def print_curves(
    title: str, places: Sequence[float], curves: Mapping[str, Sequence[float]], ticks: Mapping[float, str]
) -> None:
    """Curves over the same places, each in a letter that the legend names. `ticks`: texts below the axis."""
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(72, 16)
    for letter, values in zip("abcdefgh", curves.values(), strict=False):
        plotext.plot(places, values, marker=letter)
    plotext.xticks(list(ticks), list(ticks.values()))
    plotext.title(title)
    picture = plotext.build().rstrip("\n")
    print(picture if sys.stdout.isatty() else plotext.uncolorize(picture))
    print("  " + "; ".join(f"{letter} {name}" for letter, name in zip("abcdefgh", curves, strict=False)))


@contextmanager
def progress(
    total: int | None = None, *, in_bytes: bool = False, shown: bool = True, screen: TextIO | None = None
) -> Iterator[Advance]:
    """A bar with the time left on standard error, where that is a terminal; gone when the work is done.

    `in_bytes`: the units are bytes, so that size and speed are shown as well. `screen`: in place of standard error.
    """
    screen = screen or sys.stderr
    if not (shown and screen.isatty()):
        yield lambda done, text="", total=None: None
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


def watched(items: Iterator, size: Callable, total: int, shown: bool = True, screen: TextIO | None = None) -> Iterator:
    """The items, with a bar over the sum of their sizes."""
    with progress(total, shown=shown, screen=screen) as advance:
        for item in items:
            yield item
            advance(size(item))  # asked for the next one, the caller is done with this one
