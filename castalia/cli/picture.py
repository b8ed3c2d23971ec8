"""What a picture's file may be called, asked before anything is computed for it."""

from __future__ import annotations

from pathlib import Path

from castalia.errors import ConfigError

ENDINGS = (".png", ".svg", ".pdf", ".jpg")


def check_picture(path: Path | None, option: str) -> None:
    """Raises ConfigError unless the file's ending tells a kind of picture."""
    if path is not None and path.suffix.lower() not in ENDINGS:
        raise ConfigError(f"{option} {path}: a picture's name ends with {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
