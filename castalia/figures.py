"""Figures of matplotlib: how they look, what their files may be called, and how they are written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castalia.errors import ConfigError
from castalia.files import appearing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg", ".pdf", ".jpg")


def check_picture(path: Path | None, option: str) -> None:
    """Raise ConfigError unless the file's ending names a picture format. Asked before anything is computed for it."""
    if path is not None and path.suffix.lower() not in ENDINGS:
        raise ConfigError(f"{option} {path}: a picture's name ends with {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")


def panels(rows: int = 1, columns: int = 1, *, size: tuple[float, float], **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `size` inches and its panels, row by row. `options` are those of `Figure.subplots`.

    No pyplot: its figures belong to a backend with a screen and stay in memory until they are closed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def plain(axes: Sequence[Axes]) -> None:
    """A light grid, and no frame above and on the right."""
    for each in axes:
        each.grid(True, alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)


def shades(number: int) -> list[tuple[float, float, float, float]]:
    """So many colours from dark to light, for things in an order, such as layers; told apart in grey as well."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.95 * place / max(1, number - 1)) for place in range(number)]


def write_picture(figure: Figure, path: Path) -> None:
    """Write the figure in the format of the file's ending, into a folder that is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path) as file:
        figure.savefig(file, format=path.suffix.lower().removeprefix("."), dpi=130)
