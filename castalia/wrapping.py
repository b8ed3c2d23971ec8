"""Text that fits the screen: no line is wider than WIDTH columns, unless a single word (a path) is."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

WIDTH = 100
LONG_WORD = 40  # a column is made no wider than this for a single word, which then sticks out


def wrapped(text: str, hang: int = 2) -> str:
    """The text with each of its lines broken at spaces where it is too long; what follows hangs `hang` columns in."""
    return "\n".join(line for each in text.split("\n") for line in _wrap(each, WIDTH, hang))


def shortened(text: str) -> str:
    """One line: the text, or its beginning and `...`."""
    return text if len(text) <= WIDTH else text[: WIDTH - 4].rstrip(" ,;:") + " ..."


def aligned(rows: Sequence[Sequence[str]], indent: int = 2) -> list[str]:
    """Rows of cells as lines with aligned columns, two spaces apart. Where they do not fit, the widest columns are
    wrapped."""
    if not rows:
        return []
    widths = _fitting(rows, WIDTH - indent - 2 * (len(rows[0]) - 1))
    lines = []
    for row in rows:
        cells = [_wrap(cell, width, 0) for cell, width in zip(row, widths, strict=True)]
        for number in range(max(map(len, cells))):
            parts = (cell[number] if number < len(cell) else "" for cell in cells)
            text = "  ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True))
            lines.append(" " * indent + text.rstrip())
    return lines


def _fitting(rows: Sequence[Sequence[str]], room: int) -> list[int]:
    """The widths of columns, of which the widest give way until they fit. None becomes narrower than its words, unless
    those are very long."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    words = [[len(word) for cell in column for word in cell.split()] for column in columns]
    least = [min(LONG_WORD, max(sizes, default=0)) for sizes in words]
    while sum(widths) > room and (free := [n for n in range(len(widths)) if widths[n] > least[n]]):
        widths[max(free, key=lambda n: widths[n])] -= 1
    return widths


def _wrap(line: str, width: int, hang: int) -> list[str]:
    if len(line) <= width:
        return [line]
    begin = " " * (len(line) - len(line.lstrip()))
    # A path that is broken can be neither read nor copied.
    options = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False}
    indents = {"initial_indent": begin, "subsequent_indent": begin + " " * hang}
    return textwrap.wrap(line.strip(), width, **indents, **options) or [line]  # type: ignore[arg-type]


def facts(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Names and texts in two columns, wrapped before the hundredth."""
    for name, text in rows:
        paragraphs = text.splitlines() or [""]
        lines = [line for paragraph in paragraphs for line in textwrap.wrap(paragraph, 84) or [""]]
        for number, line in enumerate(lines):
            yield f"{name if number == 0 else '':<15}{line}".rstrip()
