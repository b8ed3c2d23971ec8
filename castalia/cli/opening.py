"""How the verbs that compute with a checkpoint open it: what was guessed or taken for something else is said."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from castalia.checkpoint.tensors import Checkpoint

# Settings that an evaluation reads, by the beginnings of their names.
EVALUATION_KEYS = (
    "model.", "data.", "train.device", "train.micro_batch_size", "precision.compute", "eval.suite",
    "eval.results_prefix",
)  # fmt: skip


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


def open_for_evaluation(path: str, words: Sequence[str], step: int | None = None) -> Checkpoint:
    """The checkpoint under the files and values that an evaluation is given; notes are told.

    `path` may also be the first of the files, if they say where the checkpoint is, as GPT-NeoX's evaluation takes them.
    Raises ConfigError if they do not, and else as `overlaid`.
    """
    from castalia.cli.train import split_words
    from castalia.config.load import load_config
    from castalia.errors import ConfigError

    if not path.endswith((".yml", ".yaml", ".json")):
        return overlaid(open_and_tell(path, step=step), words)
    files, values = split_words([path, *words])
    checkpoint = load_config(files, values).checkpoint
    place = checkpoint.resume or checkpoint.init_from or checkpoint.dir
    if place is None:
        raise ConfigError(f"{path} does not say which checkpoint: add checkpoint.resume (load in GPT-NeoX's files)")
    return overlaid(open_and_tell(place, step=step), [path, *words])


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
                "train.micro_batch_size, precision.compute, eval.suite and the options of `castalia eval --help`"
            )
    return replace(checkpoint, config=config.model_copy(update={"model": architecture(config, checkpoint)}))
