"""Read RWKV's own files of RWKV-6 models. They hold no config and no tokenizer: the tensors say what the model is."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from castalia.checkpoint.formats.rwkv.names import COPIED, FIRST_NORM, GENERATIONS, table
from castalia.checkpoint.rules import to_ours
from castalia.checkpoint.rwkv_tensors import rwkv_settings
from castalia.checkpoint.tensors import Checkpoint, CheckpointFacts, Progress
from castalia.config.schema import DataConfig, ModelConfig, RunConfig, TokenizerConfig
from castalia.errors import CheckpointError
from castalia.storage.lazy import TensorRef
from castalia.storage.torch_file import open_pt

LENGTH = 4096  # of the sequences that published models were trained on; the files do not say it
BLOCK_NUMBER = re.compile(r"blocks\.(\d{1,9})\.")
FAMILY = ("emb.weight", "blocks.0.att.receptance.weight", "blocks.0.ffn.receptance.weight")


def detect(path: Path) -> bool:
    """Whether a path is that of a file with a model of the RWKV family, of any generation."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    try:
        held = open_pt(path)
    except CheckpointError:
        return False
    return isinstance(held, Mapping) and (held.keys() >= set(FAMILY) or _generation(held) > 6)


def _generation(held: Mapping) -> int:
    return next((number for mark, number in GENERATIONS.items() if mark in held), 0)


def read(path: Path, tokenizer: str | None = None) -> Checkpoint:
    """Open a file; of the tensors only the first two norms are read. `tokenizer`: that of the model.

    Where the norm of the embedding equals the first one of block 0, the model is as GPT-NeoX has it, which takes this
    one twice. Raises CheckpointError for other generations than RWKV-6, and for tensors that are no such model.
    """
    held = open_pt(path)
    if (generation := _generation(held)) != 6:
        named = f"RWKV-{generation}" if generation else "an older one"
        raise CheckpointError(f"{path} is of another generation of RWKV ({named}); only RWKV-6 is read")
    strange = [name for name, ref in held.items() if not (isinstance(name, str) and isinstance(ref, TensorRef))]
    if strange:
        raise CheckpointError(f"{path}: {strange[0]!r} is no tensor with a name, where weights are expected")
    theirs = {name: [ref] for name, ref in held.items()}
    model, own = _model(held, str(path)), f"{FIRST_NORM}."
    if not model.embedding_norm:
        theirs = {name: refs for name, refs in theirs.items() if not name.startswith(own)}
    return Checkpoint(
        str(path),
        "rwkv",
        to_ours(table(model), theirs),
        None,
        Progress(),
        RunConfig(model=model, data=DataConfig(seq_length=LENGTH), tokenizer=TokenizerConfig(path=tokenizer)),
        facts=CheckpointFacts(model_type="RWKV-6"),
    )


def _model(held: Mapping[str, TensorRef], path: str) -> ModelConfig:
    shapes = {name: tuple(ref.shape) for name, ref in held.items()}
    if len(shapes["emb.weight"]) != 2:
        raise CheckpointError(f"{path}: emb.weight has shape {list(shapes['emb.weight'])}, where a matrix is expected")
    settings, (rows, hidden) = rwkv_settings(shapes, "blocks.0.", path), shapes["emb.weight"]
    if shapes["blocks.0.att.time_faaaa"][0] * shapes["blocks.0.att.time_faaaa"][1] != hidden:
        raise CheckpointError(f"{path}: the heads together are not as wide as the model, {hidden}; ours must be")
    embedding_norm = any(_differs(held, part, path) for part in ("weight", "bias"))
    try:
        return ModelConfig(
            num_layers=1 + max(int(match[1]) for match in map(BLOCK_NUMBER.match, shapes) if match),
            hidden_size=hidden,
            vocab_size=rows,
            vocab_multiple=1,
            position="none",
            pattern=("rwkv",),
            embedding_norm=embedding_norm,
            **settings,
        )
    except ValueError as error:  # pydantic's ValidationError is a ValueError
        raise CheckpointError(f"{path} is of no usable model: {error}") from error


def _differs(held: Mapping[str, TensorRef], part: str, path: str) -> bool:
    """Whether this part of the embedding's norm is another than that of block 0's first norm."""
    names = [f"{norm}.{part}" for norm in (FIRST_NORM, COPIED)]
    if missing := [name for name in names if name not in held]:
        raise CheckpointError(f"{path}: {missing[0]} is missing: the file is not of a whole model")
    first, second = (held[name] for name in names)
    if first.shape != second.shape or first.dtype_name != second.dtype_name:
        return True
    return not np.array_equal(first.read().float().numpy(), second.read().float().numpy())
