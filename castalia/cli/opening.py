"""How the verbs that compute with a checkpoint open it: what was guessed or taken for something else is said."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from castalia.checkpoint.tensors import Checkpoint

# Settings that an evaluation reads, by the beginnings of their names.
EVALUATION_KEYS = ("model.", "data.", "train.device", "train.micro_batch_size", "precision.compute")


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


def overlaid(checkpoint: Checkpoint, words: Sequence[str]) -> Checkpoint:
    """The checkpoint with its config under the files and values that an evaluation is given.

    Raises CheckpointError where they describe another model, ConfigError for a value that evaluation does not read.
    """
    from castalia.cli.config import print_notes
    from castalia.cli.train import split_words
    from castalia.config.load import load_config
    from castalia.config.schema import RunConfig
    from castalia.errors import ConfigError
    from castalia.train.resolve import architecture

    if not words:
        return checkpoint
    files, values = split_words(list(words))
    config = load_config([checkpoint.config or RunConfig(), *files], values)
    print_notes(config)
    for path, origin in config.origins.items():
        if origin.startswith("command line") and not path.startswith(EVALUATION_KEYS):
            raise ConfigError(
                f"{origin}: {path} has no effect on an evaluation; what has are data.*, train.device, "
                "train.micro_batch_size, precision.compute and the options of `castalia eval --help`"
            )
    return replace(checkpoint, config=config.model_copy(update={"model": architecture(config, checkpoint)}))
