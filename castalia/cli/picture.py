"""Pictures: what their files may be called, asked before anything is computed for them, and how they are written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from castalia.errors import ConfigError
from castalia.files import appearing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg", ".pdf", ".jpg")


def check_picture(path: Path | None, option: str) -> None:
    """Raises ConfigError unless the file's ending tells a kind of picture."""
    if path is not None and path.suffix.lower() not in ENDINGS:
        raise ConfigError(f"{option} {path}: a picture's name ends with {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")


def write_picture(figure: Figure, path: Path) -> None:
    """Into a folder that is made if need be; the figure is closed."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path) as file:
        figure.savefig(file, format=path.suffix.lower().removeprefix("."), dpi=130)
    pyplot.close(figure)
