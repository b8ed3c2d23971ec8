"""Notes on a config, and their short form for verbs that have more to say."""

from __future__ import annotations

from collections.abc import Iterable

from castalia.units import plural

FEW = 2  # notes on keys without effect that are shown


class WithoutEffect(str):
    """A note on a key that has no effect."""


def folded(notes: Iterable[str]) -> list[str]:
    """The notes, with those on keys without effect counted in one line where they are more than a few."""
    notes = list(notes)
    idle = [note for note in notes if isinstance(note, WithoutEffect)]
    if len(idle) <= FEW:
        return notes
    line = f"{plural(len(idle), 'key')} without effect (castalia config check lists them)"
    return [note for note in notes if note not in idle] + [line]
