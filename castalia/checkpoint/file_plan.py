"""The plan of a conversion: the files that a checkpoint becomes, each written by itself, piece by piece.

Every format's `plan(checkpoint, options)` returns a `Plan`. No tensor is read until its file is written, so memory is
bounded by a piece for each file that is being written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from castalia.bars import Tally
from castalia.checkpoint.tensors import Checkpoint
from castalia.storage.lazy import TensorRef
from castalia.storage.pt_writer import PtFile
from castalia.storage.safetensors import write_safetensors
from castalia.strict_json import to_json

SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class TargetLayout:
    """The ranks that files are cut over. `pp` 0: NeoX's layout without a pipeline, one file of weights a rank."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero: Literal[0, 1] = 0


@dataclass(frozen=True)
class WriteOptions:
    """What the user may choose of the files. Formats ignore what does not apply to them."""

    layout: TargetLayout = TargetLayout()
    era: Literal["v1", "head"] = "head"
    folder: Path | None = None  # where the files will lie, which a NeoX config has to name; None: it names no folder
    trainer: bool = False  # Hugging Face: the optimizer state in the files of transformers' Trainer
    # GGUF: the type of matrices, by ggml's name; None: as they are.
    gguf_type: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    shard_bytes: int = SHARD_BYTES  # formats without ranks cut their weights into files of at most this size


@dataclass(frozen=True)
class OutputFile:
    """A file to be written. `write(path, advance)` returns a JSON value, which `Plan.finish` receives."""

    name: str  # path below the checkpoint's folder
    num_bytes: int
    write: Callable[[Path, Tally], Any]
    tensors: tuple[TensorRef, ...] = ()  # the tensors that are read for it


def _nothing_left(folder: Path, results: Mapping[str, Any]) -> None:
    pass


@dataclass(frozen=True)
class Plan:
    """The files of one checkpoint in another format."""

    outputs: tuple[OutputFile, ...]
    notes: tuple[str, ...] = ()  # what the conversion changes or leaves out, for the user
    # `finish(folder, results)` writes what depends on the other files.
    finish: Callable[[Path, Mapping[str, Any]], None] = _nothing_left
    # Where the files cannot hold the source's tensors as they are: the tensors that they hold, for who compares.
    held: Checkpoint | None = None
    file: bool = False  # whether the only output is the checkpoint itself, of the destination's name, not in a folder

    @property
    def num_bytes(self) -> int:
        """The size of all outputs; what `finish` writes is small and not counted."""
        return sum(output.num_bytes for output in self.outputs)


def shards(tensors: Mapping[str, TensorRef], limit: int) -> list[dict[str, TensorRef]]:
    """The tensors in order, in groups of at most `limit` bytes; a larger tensor is a group of its own."""
    groups: list[dict[str, TensorRef]] = [{}]
    size = 0
    for name, ref in tensors.items():
        if groups[-1] and size + ref.num_bytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = ref
        size += ref.num_bytes
    return groups


def tensors_output(name: str, tensors: Mapping[str, TensorRef]) -> OutputFile:
    """A safetensors file. The format has no place for checksums, so none are computed."""
    size = sum(ref.num_bytes for ref in tensors.values())

    def write(path: Path, advance: Tally) -> None:
        """See `OutputFile`."""
        write_safetensors(path, tensors, advance, checksums=False)

    return OutputFile(name, size, write, tuple(tensors.values()))


def pt_output(name: str, value: Any) -> OutputFile:
    """A file of `torch.save`; see `castalia.storage.pt_writer` for what the value may be made of."""
    file = PtFile(value)
    title = Path(name).stem
    return OutputFile(name, file.num_bytes, lambda path, advance: file.write(path, title, advance), file.tensors)


def bytes_output(name: str, data: bytes | str) -> OutputFile:
    """A small file whose content is known already."""
    content = data.encode() if isinstance(data, str) else data
    return OutputFile(name, len(content), lambda path, advance: write_bytes(path, content, advance))


def json_output(name: str, value: object) -> OutputFile:
    """A small file that holds a value as JSON."""
    return bytes_output(name, json_text(value))


def json_text(value: object) -> str:
    """Indented JSON with a newline at the end, as other programs write their configs."""
    return to_json(value, indent=2, ensure_ascii=False) + "\n"


def write_bytes(path: Path, content: bytes, advance: Tally) -> None:
    """Write a small file at once, and report its bytes to `advance`."""
    path.write_bytes(content)
    advance(len(content))


def named_groups(stem: str, groups: Sequence[Mapping[str, TensorRef]]) -> dict[str, Mapping[str, TensorRef]]:
    """The groups by file name, as Hugging Face names them: `stem.safetensors`, or `stem-00001-of-00003.safetensors`."""
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}
