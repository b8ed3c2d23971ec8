"""Read GGUF files of the GPT-NeoX, GPT-2 and Llama families, in fp32, fp16, bf16 and q8_0. No tokenizer is read."""

from __future__ import annotations

from pathlib import Path

from castalia.checkpoint.formats.gguf.gguf_metadata import from_metadata
from castalia.checkpoint.formats.gguf.names import LLAMA3_FACTORS, table
from castalia.checkpoint.rules import to_ours
from castalia.checkpoint.tensors import Checkpoint, CheckpointFacts, Progress
from castalia.config.schema import DataConfig, RunConfig, TokenizerConfig
from castalia.storage.gguf_file import is_gguf, open_gguf


def detect(path: Path) -> bool:
    """Whether a path is that of a GGUF file."""
    return is_gguf(path)


def read(path: Path, tokenizer: str | None = None) -> Checkpoint:
    """Open a file; only its header is read. `tokenizer`: that of the model, since the one in the file is not read.

    Raises CheckpointError for models that ours cannot be, and for damaged files.
    """
    contents = open_gguf(path)
    shapes = {name: tuple(ref.shape) for name, ref in contents.tensors.items()}
    model = from_metadata(contents.metadata, shapes, str(path))
    name = contents.metadata["general.architecture"]
    theirs = {key: [ref] for key, ref in contents.tensors.items() if key != LLAMA3_FACTORS}
    return Checkpoint(
        str(path),
        "gguf",
        to_ours(table(name, model), theirs),
        None,
        Progress(),
        RunConfig(
            model=model,
            data=DataConfig(seq_length=min(model.max_positions or 2048, 2048)),
            tokenizer=TokenizerConfig(path=tokenizer),
        ),
        facts=CheckpointFacts(model_type=name),
    )
