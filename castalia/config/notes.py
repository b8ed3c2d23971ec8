"""Notes on a config, and their short form for verbs that have more to say."""

from __future__ import annotations

import re
from collections.abc import Iterable

from castalia.units import plural

IDLE = re.compile(r" ha(s|ve) no effect\b")  # as the notes on such keys say, in all rules
FEW = 2  # so many of them are shown


def folded(notes: Iterable[str]) -> list[str]:
    """The notes, with those on keys without effect counted in one line where they are more than a few."""
    notes = list(notes)
    idle = [note for note in notes if IDLE.search(note)]
    if len(idle) <= FEW:
        return notes
    line = f"{plural(len(idle), 'key')} without effect (castalia config check lists them)"
    return [note for note in notes if note not in idle] + [line]
