"""What verbs show on a terminal: tables, a progress bar, sizes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO

from castalia.bars import progress
from castalia.wrapping import WIDTH, aligned, facts, wrapped


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
    for line in facts(rows):
        print(line, flush=True)


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


def watched(items: Iterator, size: Callable, total: int, shown: bool = True, screen: TextIO | None = None) -> Iterator:
    """The items, with a bar over the sum of their sizes."""
    with progress(total, shown=shown, screen=screen) as advance:
        for item in items:
            yield item
            advance(size(item))  # asked for the next one, the caller is done with this one
