"""What the writers of all formats share: a plan of files, each written alone, piece by piece, in bounded memory.

A format's `plan(checkpoint, options)` says which files a checkpoint becomes. Nothing is read until one is written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from castalia.checkpoint.checksum import crc32
from castalia.checkpoint.container import as_integers
from castalia.checkpoint.lazy import bounds
from castalia.checkpoint.stored import ALIGNMENT, DTYPE_CODES, StoredTensor, as_bytes
from castalia.checkpoint.tensors import ITEM_BYTES, Slices, TensorRef, Typed

PIECE_BYTES = 2 << 20  # small enough for the processor's cache and for memory that is used again
SLICE_BYTES = 256 << 10  # written at once: for larger writes the system takes large runs of memory, which are cold
SHARD_BYTES = 4 << 30

Advance = Callable[[int], None]  # called with the bytes written since the last call
T = TypeVar("T")


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
    shard_bytes: int = SHARD_BYTES  # formats without ranks cut their weights into files of about this size


@dataclass(frozen=True)
class Output:
    """A file to be written. `write` gives a JSON value that `Plan.finish` gets."""

    name: str  # path below the checkpoint's folder
    num_bytes: int
    write: Callable[[Path, Advance], Any]


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


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; each is made in another thread while the one before is in use."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item  # type: ignore[misc]


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
        for name, data in ahead((name, as_bytes(piece)) for name, ref in tensors.items() for piece in pieces(ref)):
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

    return Output(name, size, write)


def bytes_output(name: str, data: bytes | str) -> Output:
    """A small file whose content is known."""
    content = data.encode() if isinstance(data, str) else data
    return Output(name, len(content), lambda path, advance: write_bytes(path, content, advance))


def json_output(name: str, value: object) -> Output:
    return bytes_output(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_bytes(path: Path, content: bytes, advance: Advance) -> None:
    path.write_bytes(content)
    advance(len(content))


def sync(path: Path) -> None:
    """Wait until a file's or folder's content is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass
class Verified(Typed):
    """A stored tensor whose checksums are verified: on the way when it is read from end to end, else before."""

    source: StoredTensor
    verified: bool = False
    rows: int = 0  # that were read, one after another from the first
    crc32: int = 0  # of these
    lock: Lock = field(default_factory=Lock, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype_name(self) -> str:
        return self.source.dtype_name

    def read(self, slices: Slices | None = None) -> torch.Tensor:
        value = self.source.read(slices)
        if not self.verified:
            with self.lock:
                self._verify(value, slices)
        return value

    def _verify(self, value: torch.Tensor, slices: Slices | None) -> None:
        box, extents = bounds(self.shape, slices), self.source.extents
        if len(extents) == 1 and box and box[0][0] == self.rows and tuple(value.shape[1:]) == self.shape[1:]:
            self.rows, self.crc32 = box[0][1], crc32(as_bytes(value), self.crc32)
            if self.rows == self.shape[0] and extents[0].crc32 is not None:
                self.source.check_crc(extents[0], self.crc32)
            self.verified = self.rows == self.shape[0]
        elif not self.verified:
            self.source.verify()
            self.verified = True


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
