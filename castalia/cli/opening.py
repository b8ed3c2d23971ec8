"""How the verbs that compute with a checkpoint open it: what was guessed or taken for something else is said."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from castalia.checkpoint.tensors import Checkpoint


def open_and_tell(path: str, **options: Any) -> Checkpoint:
    """`open_checkpoint`, and its notes on standard error."""
    from castalia.checkpoint.opener import open_checkpoint

    checkpoint = open_checkpoint(path, **options)
    tell(checkpoint.notes, path)
    return checkpoint


def tell(notes: Iterable[str], path: str) -> None:
    """On standard error, by one process."""
    from castalia.cli.render import say
    from castalia.parallel.process_group import is_main

    if is_main():
        for note in notes:
            say(f"note: {path}: {note}", sys.stderr)
