"""Write a model and its tokenizer as one GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from castalia.checkpoint.file_plan import OutputFile, Plan, WriteOptions
from castalia.checkpoint.formats.gguf.gguf_metadata import to_metadata
from castalia.checkpoint.formats.gguf.gguf_vocabulary import vocabulary
from castalia.checkpoint.formats.gguf.names import ARCHITECTURES, LLAMA3_FACTORS, architecture_of, table
from castalia.checkpoint.restore import architecture, load_tokenizer_for
from castalia.checkpoint.rules import to_theirs
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import ModelConfig
from castalia.config.tensor_table import constant_value, row_of, tensor_shapes
from castalia.data.tokenizer import Tokenizer
from castalia.errors import CastaliaError, CheckpointError
from castalia.model.positions import rotary_frequencies
from castalia.storage.derived import Cast, Narrowed, float32
from castalia.storage.gguf_file import BLOCK, DTYPES, GgufFile, Rounded, Stored
from castalia.storage.lazy import InMemory, TensorRef, Zeros

FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # general.file_type: the type of most matrices
OURS = {dtype: type for type, dtype in DTYPES.items()}


def plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    """The file. Raises CheckpointError for a model or a tokenizer that llama.cpp has no equal of."""
    model = architecture(checkpoint)
    name = architecture_of(model, checkpoint.path)
    held, ours = _completed(checkpoint, model, name)
    rows = ours["embed.weight"].shape[0]
    longest = ours["positions.weight"].shape[0] if "positions.weight" in ours else _longest(checkpoint, model)
    tokens, notes = vocabulary(_tokenizer(checkpoint), rows)
    theirs = {key: refs[0] for key, refs in to_theirs(table(name, held), ours).items()}
    if held.rope_scaling and held.rope_scaling.kind == "llama3":
        theirs[LLAMA3_FACTORS] = _llama3_factors(held)
    stored = {key: _stored(key, ref, options.gguf_type) for key, ref in theirs.items()}
    kinds = [each.type for key, each in stored.items() if len(each.ref.shape) > 1 and "_norm." not in key]
    most = max(FILE_TYPES, key=kinds.count)
    metadata: dict[str, Any] = {
        "general.architecture": name,
        "general.type": "model",
        "general.name": options.folder.stem if options.folder else "model",
        "general.file_type": FILE_TYPES[most],
        **({"general.quantization_version": 2} if "q8_0" in kinds else {}),
        **to_metadata(name, held, longest, rows),
        **tokens,
    }
    file = GgufFile(metadata, stored)
    output = OutputFile("model.gguf", file.num_bytes, file.write, file.tensors)
    expected = _as_held(checkpoint, held, ours, options.gguf_type)
    return Plan((output,), (*notes, *_notes(model, stored, options.gguf_type)), file=True, held=expected)


def _notes(model: ModelConfig, stored: Mapping[str, Stored], asked: str | None) -> list[str]:
    notes = []
    if model.activation == "gelu":
        notes.append("llama.cpp computes the approximation of GELU by tanh, the model has the exact one")
    if asked == "q8_0" and (
        other := [key for key, each in stored.items() if _is_matrix(key, each.ref) and each.type != asked]
    ):
        notes.append(f"rows of q8_0 are multiples of {BLOCK}: {len(other)} matrices, {other[0]} first, are f16")
    return notes


def _completed(checkpoint: Checkpoint, model: ModelConfig, name: str) -> tuple[ModelConfig, dict[str, TensorRef]]:
    """The same function with all tensors that the architecture needs: biases of zeros, a copy of a tied head."""
    needed = {key: key != "tie_embeddings" for key in ARCHITECTURES[name].needs}
    rows = checkpoint.model["embed.weight"].shape[0]
    held = model.with_({**needed, "vocab_size": rows, "vocab_multiple": 1, "zero_centered_norms": False})
    ours = dict(checkpoint.model)
    if model.zero_centered_norms:  # weights to which the model adds 1 in each pass
        centered = [key for key in ours if row_of(key).init == "ones" and constant_value(model, key) == 0]
        ours |= {key: InMemory(float32(ours[key]).read() + 1) for key in centered}
    for key, shape in tensor_shapes(held).items():
        if key not in ours:
            ours[key] = ours["embed.weight"] if key == "head.weight" else Zeros(shape)
    return held, ours


def _as_held(checkpoint: Checkpoint, held: ModelConfig, ours: Mapping[str, TensorRef], asked: str | None) -> Checkpoint:
    """The checkpoint with the tensors that the file holds, with their values in it."""
    assert checkpoint.config is not None
    rounded = {
        key: Rounded(float32(ref)) if asked == "q8_0" and key != "positions.weight" and _fits(ref) else ref
        for key, ref in ours.items()
    }
    return replace(checkpoint, model=rounded, optimizer=None, config=checkpoint.config.with_({"model": held}))


def _fits(ref: TensorRef) -> bool:
    return len(ref.shape) == 2 and ref.shape[1] % BLOCK == 0


def _is_matrix(name: str, ref: TensorRef) -> bool:
    """Whether a tensor has the type that is asked for: norms, biases and positions are always in fp32."""
    return len(ref.shape) > 1 and name != "position_embd.weight" and "_norm." not in name


def _stored(name: str, ref: TensorRef, asked: str | None) -> Stored:
    kind = asked or OURS[ref.dtype_name]
    if not _is_matrix(name, ref):
        return Stored(float32(ref), "f32")
    if kind == "q8_0":
        if _fits(ref):
            return Stored(float32(ref), kind)
        kind = "f16"
    dtype = DTYPES[kind]
    if ref.dtype_name == dtype:
        return Stored(ref, kind)
    return Stored(Narrowed(ref, dtype, name) if kind != "f32" else Cast(ref, dtype), kind)


def _llama3_factors(model: ModelConfig) -> TensorRef:
    """What llama.cpp divides each pair's frequency by."""
    plain, _ = rotary_frequencies(model.with_({"rope_scaling": None}))
    return InMemory(plain / rotary_frequencies(model)[0])


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    try:
        return load_tokenizer_for(checkpoint)
    except CastaliaError as error:
        raise CheckpointError(f"a GGUF file holds its tokenizer, which is missing: {error}") from error


def _longest(checkpoint: Checkpoint, model: ModelConfig) -> int:
    return model.max_positions or (checkpoint.config.data.seq_length if checkpoint.config else 2048)
