"""What the writers of all formats share: a plan of files, each written alone, piece by piece, in bounded memory.

A format's `plan(checkpoint, options)` says which files a checkpoint becomes. Nothing is read until one is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from castalia.checkpoint.checksum import crc32
from castalia.checkpoint.container import Blob, FileTensor, as_integers, row_major
from castalia.checkpoint.lazy import Adapted, Cast, join
from castalia.checkpoint.stored import ALIGNMENT, DTYPE_CODES, Extent, StoredTensor, as_bytes
from castalia.checkpoint.tensors import ITEM_BYTES, Checkpoint, Slices, TensorRef, Typed
from castalia.errors import CheckpointError
from castalia.strict_json import to_json

PIECE_BYTES = 4 << 20  # small enough for the processor's cache and for memory that is used again
SLICE_BYTES = 256 << 10  # written at once: for larger writes the system takes large runs of memory, which are cold
SHARD_BYTES = 4 << 30

Kind = TypeVar("Kind")
Advance = Callable[[int], None]  # called with the bytes written since the last call


@dataclass(frozen=True)
class Layout:
    """Over how many ranks files are laid out. `pp` 0 is the layout without a pipeline, one file of weights a rank."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero: Literal[0, 1] = 0


@dataclass(frozen=True)
class WriteOptions:
    layout: Layout = Layout()
    era: Literal["v1", "head"] = "head"
    folder: Path | None = None  # where the files will lie, which the original's config names; None: it names nothing
    shard_bytes: int = SHARD_BYTES  # formats without ranks cut their weights into files of about this size


@dataclass(frozen=True)
class Output:
    """A file to be written. `write` gives a JSON value that `Plan.finish` gets."""

    name: str  # path below the checkpoint's folder
    num_bytes: int
    write: Callable[[Path, Advance], Any]
    tensors: tuple[TensorRef, ...] = ()  # that are read for it


def _nothing_left(folder: Path, results: Mapping[str, Any]) -> None:
    pass


@dataclass(frozen=True)
class Plan:
    outputs: tuple[Output, ...]
    notes: tuple[str, ...] = ()  # what this hop changes by nature, and what it leaves out
    finish: Callable[[Path, Mapping[str, Any]], None] = _nothing_left  # writes what needs the results of all outputs

    @property
    def num_bytes(self) -> int:
        return sum(output.num_bytes for output in self.outputs)


def pieces(ref: TensorRef, piece_bytes: int = PIECE_BYTES) -> Iterator[torch.Tensor]:
    """The tensor in row-major order, some rows at a time."""
    if not ref.shape:
        yield ref.read()
        return
    step = max(1, piece_bytes // max(1, math.prod(ref.shape[1:]) * ref.dtype.itemsize))
    for start in range(0, ref.shape[0], step):
        yield ref.read([slice(start, min(start + step, ref.shape[0]))])


def slices_of(data: memoryview) -> Iterator[memoryview]:
    """The same bytes, so many at a time as are written at once."""
    return (data[start : start + SLICE_BYTES] for start in range(0, len(data), SLICE_BYTES))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype are equal, NaNs and signs of zeros included."""
    return np.array_equal(as_integers(a.contiguous()), as_integers(b.contiguous()))


def num_bytes(ref: TensorRef) -> int:
    return math.prod(ref.shape) * ITEM_BYTES[ref.dtype_name]


def shards(tensors: Mapping[str, TensorRef], limit: int) -> list[dict[str, TensorRef]]:
    """The tensors in order, in groups of at most `limit` bytes; a larger tensor is a group of its own."""
    groups: list[dict[str, TensorRef]] = [{}]
    size = 0
    for name, ref in tensors.items():
        if groups[-1] and size + num_bytes(ref) > limit:
            groups.append({})
            size = 0
        groups[-1][name] = ref
        size += num_bytes(ref)
    return groups


def write_tensors(
    path: Path, tensors: Mapping[str, TensorRef], advance: Advance, checksums: bool = True
) -> dict[str, list[int]]:
    """Write a safetensors file and return the offset of the first byte and the CRC-32 (or 0) of each tensor."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, ref in tensors.items():
        start, end = end, end + num_bytes(ref)
        header[name] = {"dtype": DTYPE_CODES[ref.dtype_name], "shape": list(ref.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    base = 8 + len(text)
    found = {name: [base + header[name]["data_offsets"][0], 0] for name in tensors}
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, ref in tensors.items():
            for data in map(as_bytes, pieces(ref)):
                for part in slices_of(data):
                    file.write(part)
                    if checksums:
                        found[name][1] = crc32(part, found[name][1])
                advance(len(data))
    return found


def tensors_output(name: str, tensors: Mapping[str, TensorRef]) -> Output:
    """A safetensors file, whose format has no place for checksums."""
    size = sum(num_bytes(ref) for ref in tensors.values())

    def write(path: Path, advance: Advance) -> None:
        write_tensors(path, tensors, advance, checksums=False)

    return Output(name, size, write, tuple(tensors.values()))


def bytes_output(name: str, data: bytes | str) -> Output:
    """A small file whose content is known."""
    content = data.encode() if isinstance(data, str) else data
    return Output(name, len(content), lambda path, advance: write_bytes(path, content, advance))


def json_output(name: str, value: object) -> Output:
    return bytes_output(name, json_text(value))


def json_text(value: object) -> str:
    return to_json(value, indent=2, ensure_ascii=False) + "\n"


def write_bytes(path: Path, content: bytes, advance: Advance) -> None:
    path.write_bytes(content)
    advance(len(content))


@contextmanager
def verifying(tensors: Iterable[TensorRef]) -> Iterator[None]:
    """Within this, checksums of what is read for these tensors are computed on the way; at its end all are verified.

    Raises CheckpointError for damage.
    """
    blobs = reached(tensors, Blob)
    for blob in blobs:
        blob.deferred = True
    try:
        yield
        for blob in blobs:
            blob.finish()
    finally:
        for blob in blobs:
            blob.deferred = False


def reached(tensors: Iterable[TensorRef], kind: type[Kind]) -> list[Kind]:
    """What of this kind is read for these tensors in the end, or on the way."""
    seen: set[int] = set()
    found: list[Kind] = []
    todo: list[Any] = [*tensors]
    while todo:
        each = todo.pop()
        if type(each) is int or id(each) in seen:  # most are numbers of shapes
            continue
        seen.add(id(each))
        if isinstance(each, kind):
            found.append(each)
        if isinstance(each, Typed):  # its fields have the tensors that it is made of
            todo += vars(each).values()
        elif isinstance(each, (tuple, list)):
            todo += each
    return found


def verified(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, each byte of which is verified when it is used. Only native ones do not do so by themselves."""
    if checkpoint.format != "native":
        return checkpoint
    known: dict[int, TensorRef] = {}  # a tensor that is weight and master stays one

    def checked(ref: Any) -> Any:
        if isinstance(ref, Cast):
            return Cast(checked(ref.source), ref.dtype_name)
        if isinstance(ref, Adapted):
            return Adapted(checked(ref.source), checked(ref.a), checked(ref.b), ref.scale)
        return known.setdefault(id(ref), in_blobs(ref)) if isinstance(ref, StoredTensor) else ref

    model = {name: checked(ref) for name, ref in checkpoint.model.items()}
    state: Any = checkpoint.optimizer  # of whatever optimizer
    if state is not None:
        state = {name: {kind: checked(ref) for kind, ref in each.items()} for name, each in state.items()}
    return replace(checkpoint, model=model, optimizer=state)


def verify(tensors: Iterable[TensorRef]) -> None:
    """Read what was not read yet of these tensors. Raises CheckpointError for damage."""
    for blob in reached(tensors, Blob):
        if not blob.verified:
            blob.verify()


def in_blobs(tensor: StoredTensor) -> TensorRef:
    """The same tensor, of which every byte is verified, whichever part is read.

    Raises CheckpointError unless its extents are those of a tensor cut along one dimension after another.
    """
    size = ITEM_BYTES[tensor.dtype_name]

    def joined(extents: list[Extent], dim: int) -> TensorRef:
        """Extents that differ in their start from this dimension on."""
        if dim == len(tensor.shape):
            (extent,) = extents
            blob = Blob(extent.path, extent.offset, math.prod(extent.shape) * size, extent.crc32 or 0)
            return FileTensor(blob, tensor.dtype_name, extent.shape, row_major(extent.shape))
        rows: dict[int, list[Extent]] = {}
        for extent in sorted(extents, key=lambda extent: extent.start[dim]):
            rows.setdefault(extent.start[dim], []).append(extent)
        tensors = [joined(row, dim + 1) for row in rows.values()]
        if len({(each.shape[:dim], each.shape[dim + 1 :]) for each in tensors}) > 1:
            raise CheckpointError(
                f"{tensor.name}: its parts are not those of a tensor cut along one dimension after another"
            )
        return join(tensors, dim)

    return joined(list(tensor.extents), 0)


@dataclass
class Watched(Typed):
    """A master that is read beside its weight and notes whether the weight is its rounding."""

    master: TensorRef
    weight: TensorRef
    rounds: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.master.shape

    @property
    def dtype_name(self) -> str:
        return self.master.dtype_name

    def read(self, slices: Slices | None = None) -> torch.Tensor:
        value = self.master.read(slices)
        if self.rounds and not same_bits(value.to(self.weight.dtype), self.weight.read(slices)):
            self.rounds = False
        return value


def named_groups(stem: str, groups: Sequence[Mapping[str, TensorRef]]) -> dict[str, Mapping[str, TensorRef]]:
    """File names as Hugging Face has them: `stem.safetensors`, or numbered ones."""
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}
