"""A checkpoint in a few words, and what it says of its tokenizer."""

from __future__ import annotations

from pathlib import Path

from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import TokenizerConfig

TITLES = {
    "native": "Castalia",
    "neox": "NeoX",
    "megatron-deepspeed": "Megatron-DeepSpeed",
    "huggingface": "Hugging Face",
}


def describe(checkpoint: Checkpoint) -> str:
    """For instance "NeoX v1, TP 2 x PP 4, step 150000"."""
    kind, layout = (checkpoint.details.get(key) for key in ("era", "layout"))
    kind = kind or checkpoint.details.get("model_type")
    title = TITLES.get(checkpoint.format, checkpoint.format) + (f" {kind}" if kind else "")
    step = [] if checkpoint.format == "huggingface" else [f"step {checkpoint.progress.step}"]
    return ", ".join([title, *([str(layout)] if layout else []), *step])


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
    return given.model_copy(update=found)


def model_folder(checkpoint: Checkpoint) -> Path | None:
    """Where files say which tokens end the model's text, whichever tokenizer is used."""
    return Path(checkpoint.path) if checkpoint.format == "huggingface" else None


def _beside(folder: Path, path: str | None) -> str | None:
    """A relative path means one below `folder` where that exists, else one below the working directory."""
    return str(folder / path) if path is not None and (folder / path).exists() else path
