"""A checkpoint in a few words, and what it says of its tokenizer."""

from __future__ import annotations

from pathlib import Path

from castalia.checkpoint.formats import FORMATS
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import TokenizerConfig


def describe(checkpoint: Checkpoint) -> str:
    """For instance "NeoX v1, TP 2 x PP 4, step 150000"."""
    row, facts = FORMATS[checkpoint.format], checkpoint.facts
    kind = facts.era or facts.model_type
    title = row.title + (f" {kind}" if kind else "")
    layout = [f"TP {facts.tp} x PP {facts.pp}"] if facts.tp else []
    step = [f"step {checkpoint.progress.step}"] if row.steps else []
    return ", ".join([title, *layout, *step])


def readable(count: int) -> str:
    """162.5M, 20.55B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return str(count)


def tokenizer_settings(checkpoint: Checkpoint) -> TokenizerConfig | None:
    """The tokenizer of the training: the run's copy, else what the config names. None without a config."""
    if checkpoint.config is None:
        return None
    folder = Path(checkpoint.path)
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    if (run / "tokenizer").is_dir():
        return TokenizerConfig(path=str(run / "tokenizer"))
    given = checkpoint.config.tokenizer
    found = {key: _beside(run, getattr(given, key)) for key in ("path", "merges")}
    return given.with_(found)


def model_folder(checkpoint: Checkpoint) -> Path | None:
    """Where files say which tokens end the model's text, whichever tokenizer is used."""
    return Path(checkpoint.path) if checkpoint.format == "huggingface" else None


def _beside(folder: Path, path: str | None) -> str | None:
    """A relative path means one below `folder` where that exists, else one below the working directory."""
    return str(folder / path) if path is not None and (folder / path).exists() else path
