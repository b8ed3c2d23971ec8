"""One value on its way into the config, with its place."""

from __future__ import annotations

from typing import Any, NamedTuple

NEOX_DEFAULT = "NeoX default"


class Setting(NamedTuple):
    value: Any
    origin: str  # "file.yml:12", "command line" or "NeoX default"
    rank: int  # which source gave it: later sources have higher ranks, defaults have -1
    replaced: str = ""  # origin of the value that this one replaced

    @property
    def where(self) -> str:
        return f"{self.origin}, replacing {self.replaced}" if self.replaced else self.origin


def put(settings: dict[str, Setting], path: str, setting: Setting) -> None:
    """Set a value; a mapping's values and a value for the whole mapping (`null`) replace each other."""
    old = settings.get(path)
    if old and old.rank >= 0 and old.origin != setting.origin:
        setting = setting._replace(replaced=old.origin)
    for other in [other for other in settings if other.startswith(path + ".") or path.startswith(other + ".")]:
        del settings[other]
    settings[path] = setting
