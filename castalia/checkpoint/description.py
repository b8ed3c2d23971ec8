"""Describe a checkpoint in a few words, and find the tokenizer that it was trained with."""

from __future__ import annotations

from pathlib import Path

from castalia.checkpoint.formats import FORMATS
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.load import beside
from castalia.config.schema import TokenizerConfig


def describe(checkpoint: Checkpoint) -> str:
    """A line about a checkpoint: "NeoX v1, TP 2 x PP 4, step 150000", for instance."""
    row, facts = FORMATS[checkpoint.format], checkpoint.facts
    kind = facts.era or facts.model_type
    title = row.title + (f" {kind}" if kind else "")
    layout = [f"TP {facts.tp} x PP {facts.pp}"] if facts.tp else []
    step = [f"step {checkpoint.progress.step}"] if row.steps else []
    return ", ".join([title, *layout, *step])


def tokenizer_settings(checkpoint: Checkpoint) -> TokenizerConfig | None:
    """The settings of the tokenizer that the model was trained with; None without a config.

    A run keeps a copy of its tokenizer, which comes before the files that its config names.
    """
    if checkpoint.config is None:
        return None
    folder = Path(checkpoint.path)
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    if (run / "tokenizer").is_dir():
        return TokenizerConfig(path=str(run / "tokenizer"))
    given = checkpoint.config.tokenizer
    named = {key: getattr(given, key) for key in ("path", "merges")}
    return given.with_({key: beside(run, path) for key, path in named.items() if path})


def model_folder(checkpoint: Checkpoint) -> Path | None:
    """The folder whose files say which tokens end a text, whichever tokenizer is used; None without such files."""
    # Adapters lie apart from their model; its files know the ends of texts.
    return Path(checkpoint.facts.base or checkpoint.path) if checkpoint.format == "huggingface" else None
