"""A value while a config is being assembled, with the place that it comes from."""

from __future__ import annotations

from typing import Any, NamedTuple

NEOX_DEFAULT = "NeoX default"


class Setting(NamedTuple):
    """A value and where it comes from."""

    value: Any
    origin: str  # "file.yml:12", "command line" or "NeoX default"
    precedence: int  # position of its source: later sources override earlier ones; -1 for defaults
    replaced: str = ""  # origin of the value that this one replaced

    @property
    def where(self) -> str:
        """The origin for `config show`, with that of the value which was overridden."""
        return f"{self.origin}, replacing {self.replaced}" if self.replaced else self.origin


def put(settings: dict[str, Setting], path: str, setting: Setting) -> None:
    """Set the value at a dotted path. Values inside a mapping and a value for all of it (`null`) replace each other."""
    old = settings.get(path)
    if old and old.precedence >= 0 and old.origin != setting.origin:
        setting = setting._replace(replaced=old.origin)
    # `log.profile: null` removes log.profile.start, and log.profile.start removes `log.profile: null`.
    for other in [other for other in settings if other.startswith(path + ".") or path.startswith(other + ".")]:
        del settings[other]
    settings[path] = setting
