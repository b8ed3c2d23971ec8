"""Reads tensors' bytes. Whatever part of a file is read, the checksums that cover it are verified.

What is computed with is read here alone. `castalia.checkpoint.sampled_values` reads a few values without verifying
them, to describe and compare files.

Zip members have one checksum, our own files one for each block of 1 MiB, safetensors none (see `docs/reliability.md`).
A checksum may cover more than is asked for:

    blocks    |--------0--------|--------1--------|--------2--------|
    asked for            [==================]

Then blocks 0 and 1 are read and verified, once, before any of their bytes are given out. Inside `verifying`, blocks
that are read from beginning to end in several parts are verified on the way instead, which reads nothing twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING

import numpy as np

from castalia.errors import CheckpointError
from castalia.storage.checksum import BLOCK_BYTES, crc32
from castalia.storage.derived import join
from castalia.storage.direct import BufferedFile, DirectFile
from castalia.storage.lazy import (
    ITEM_BYTES,
    Box,
    ByteRun,
    Leaf,
    TensorRef,
    Zeros,
    as_bytes,
    as_integers,
    as_slices,
    leaves,
)

if TYPE_CHECKING:
    import torch

READ_BYTES = 1 << 18  # in one call, so that the checksum is computed while the bytes are in the processor's cache
DIRECT_BYTES = 1 << 20  # shorter reads, such as single rows, go through the page cache
ROWS_BYTES = 4 << 20  # of whole rows that are read to take some columns from them


@dataclass
class Extent:
    """Consecutive bytes of a file and the checksums that were written with them."""

    path: Path
    offset: int  # of the first byte in the file
    size: int
    sums: Sequence[int] = ()  # CRC-32 of each block, in order; empty: the format has no checksums
    block: int = BLOCK_BYTES  # bytes that a checksum covers; the last one covers the rest
    name: str = field(default="", compare=False)  # of the tensor, for errors
    # The header of the same file, which is verified first.
    head: Extent | None = field(default=None, compare=False, repr=False)
    deferred: bool = field(default=False, compare=False, repr=False)  # see `verifying`
    direct: bool = field(default=False, compare=False, repr=False)  # large parts are read past the page cache
    verified: set[int] = field(default_factory=set, compare=False, repr=False)  # numbers of blocks
    # Within `verifying`: how far a partly read block has been read.
    seen: int = field(default=0, compare=False, repr=False)
    seen_crc32: int = field(default=0, compare=False, repr=False)  # checksum of that block up to `seen`
    lock: RLock = field(default_factory=RLock, compare=False, repr=False)

    def read(self, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes from `start` on.

        Raises CheckpointError if the file is missing, truncated, or damaged in one of the blocks that are touched.
        """
        stop = start + len(out)
        if self.head and not self.head.verified:  # a header is one block
            self.head.verify()
        with self._open(stop if self.direct and len(out) >= DIRECT_BYTES else None) as file:
            if not self.sums or self.verified.issuperset(range(start // self.block, -(-stop // self.block))):
                self._read(file, start, out)
                return
            for first in range(start - start % self.block, stop, self.block):
                last = min(first + self.block, self.size)
                begin, end = max(first, start), min(last, stop)
                self._read_in_block(file, first, last, begin, out[begin - start : end - start])

    def verify(self, start: int = 0, stop: int | None = None) -> None:
        """Verify the blocks that these bytes lie in, reading those that are not verified yet. Errors as for `read`."""
        if self.head:
            self.head.verify()
        if not self.sums:
            return
        stop = self.size if stop is None else stop
        numbers = range(start // self.block, -(-stop // self.block))
        if not self.verified.issuperset(numbers):
            with self._open() as file:
                for number in numbers:
                    self._verify(file, number)

    def map(self, start: int, stop: int) -> np.ndarray:
        """These bytes, verified and memory-mapped: [stop - start], uint8. Errors as for `read`."""
        if start == stop:
            return np.empty(0, np.uint8)
        self.verify(start, stop)
        with self._open() as file:
            if file.size < self.offset + stop:
                raise self._truncated(file)
        return np.memmap(self.path, np.uint8, "r", self.offset + start, (stop - start,))

    def finish(self) -> None:
        """Verify the block of which only a beginning was read. Errors as for `read`."""
        if self.sums and self.seen % self.block:
            self.verify(self.seen, self.seen + 1)

    def _read_in_block(self, file: BufferedFile, first: int, last: int, begin: int, out: memoryview) -> None:
        """Fill `out` with bytes from `begin` on that lie in the block from `first` to `last`."""
        end, number = begin + len(out), first // self.block
        if number in self.verified:
            self._read(file, begin, out)
        elif (begin, end) == (first, last):  # the whole block: its checksum costs no second reading
            self._check(number, self._read(file, begin, out, 0))
        elif self.deferred and self._continues(first, last, begin):
            crc = self._read(file, begin, out, self.seen_crc32 if begin > first else 0)
            with self.lock:
                if self.seen == begin:  # otherwise another thread has read the same, or verified the block
                    self.seen, self.seen_crc32 = end, crc
                    if end == last:
                        self._check(number, crc)
        else:
            # Bytes before `seen` are read once more; `finish` verifies their block.
            if not (self.deferred and first < end <= self.seen <= last):
                self._verify(file, number)
            self._read(file, begin, out)

    def _continues(self, first: int, last: int, begin: int) -> bool:
        """Whether `begin` is where the block was read up to, or where it begins."""
        with self.lock:
            if begin == first and not first < self.seen <= last:
                self.finish()
                self.seen = first
            return self.seen == begin

    def _verify(self, file: BufferedFile, number: int) -> None:
        """Read a block, or what is left of it, only for its checksum."""
        with self.lock:
            if number in self.verified:
                return
            first = number * self.block
            last = min(first + self.block, self.size)
            at, crc = (self.seen, self.seen_crc32) if first < self.seen < last else (first, 0)
            buffer = memoryview(bytearray(min(READ_BYTES, last - at)))
            while at < last:
                data = buffer[: last - at]
                crc = self._read(file, at, data, crc)
                at += len(data)
            self._check(number, crc)

    def _check(self, number: int, crc: int) -> None:
        if crc != self.sums[number]:
            first = self.offset + number * self.block
            last = min(first + self.block, self.offset + self.size)
            raise CheckpointError(
                f"{self._named()} is damaged: bytes {first} to {last} have checksum {crc:08x}, "
                f"{self.sums[number]:08x} was written. Use another step, or a copy of this file."
            )
        self.verified.add(number)

    def _read(self, file: BufferedFile, start: int, out: memoryview, crc: int | None = None) -> int:
        """Fill `out`. Returns the checksum continued from `crc`; None: none is wanted."""
        done, total = 0, crc or 0
        while done < len(out):
            try:
                count = file.read_into(out[done : done + READ_BYTES], self.offset + start + done)
            except OSError as error:
                raise self._unreadable(error) from error
            if not count:
                raise self._truncated(file)
            if crc is not None:
                total = crc32(out[done : done + count], total)
            done += count
        return total

    def _open(self, direct_stop: int | None = None) -> BufferedFile:
        """The file; with `direct_stop`, to be read up to this byte of the extent past the page cache."""
        try:
            path, stop = self.path, direct_stop
            return BufferedFile(path) if stop is None else DirectFile(path, self.offset + stop)
        except OSError as error:
            raise self._unreadable(error) from error

    def _named(self) -> str:
        return f"{self.name}: {self.path}" if self.name else str(self.path)

    def _unreadable(self, error: OSError) -> CheckpointError:
        prefix = f"{self.name}: " if self.name else ""
        return CheckpointError(f"{prefix}cannot read {self.path}: {error.strerror}")

    def _truncated(self, file: BufferedFile) -> CheckpointError:
        return CheckpointError(
            f"{self._named()} is truncated: {file.size} bytes, but this tensor ends at byte "
            f"{self.offset + self.size}. Use another step, or a copy of this file."
        )


@dataclass(frozen=True, repr=False)
class FileTensor(Leaf):
    """A tensor in a file, as a strided view of an extent. Offset and strides count elements, as in torch."""

    extent: Extent
    dtype_name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    @classmethod
    def of(cls, extent: Extent, dtype_name: str, shape: tuple[int, ...]) -> FileTensor:
        """The tensor of this shape that fills the extent in row-major order."""
        return cls(extent, dtype_name, shape, row_major(shape))

    @property
    def in_order(self) -> bool:
        """Whether the elements lie in row-major order."""
        return self.stride == row_major(self.shape)

    def runs(self) -> list[ByteRun]:
        """See `TensorRef.runs`. Of a strided view, as many stored values from its first one on."""
        start = self.extent.offset + self.offset * ITEM_BYTES[self.dtype_name]
        return [ByteRun(self.extent.path, start, prod(self.shape), self.dtype_name, prod(self.shape[1:]))]

    def _fill(self, box: Box, out: torch.Tensor) -> None:
        if not out.numel():
            return
        size = ITEM_BYTES[self.dtype_name]
        if self.in_order:
            if out.shape == self.shape and out.is_contiguous():  # a short way for what is mostly asked for
                self.extent.read(self.offset * size, as_bytes(out))
            else:
                self._fill_from(self.offset, self.shape, box, out)
            return
        # Strided: map the bytes from the first to the last element, and let NumPy pick from them.
        first = self.offset + sum(start * step for (start, _), step in zip(box, self.stride, strict=True))
        last = self.offset + sum((stop - 1) * step for (_, stop), step in zip(box, self.stride, strict=True))
        integers, data = as_integers(out), self.extent.map(first * size, (last + 1) * size)
        strides = [step * size for step in self.stride]
        np.copyto(integers, np.ndarray(tuple(out.shape), integers.dtype, data, strides=strides))

    def _fill_from(self, offset: int, shape: tuple[int, ...], box: Box, out: torch.Tensor) -> None:
        """Fill `out` with the box of a row-major tensor of this shape that begins at element `offset`."""
        import torch

        size = ITEM_BYTES[self.dtype_name]
        row = prod(shape[1:])
        if _is_one_run(box, shape):
            strides = row_major(shape)
            first = offset + sum(start * step for (start, _), step in zip(box, strides, strict=True))
            buffer = out if out.is_contiguous() else torch.empty(out.shape, dtype=self.dtype)
            self.extent.read(first * size, as_bytes(buffer))
            if buffer is not out:
                out.copy_(buffer)
        elif row * size >= ROWS_BYTES:
            for index in range(*box[0]):  # rows are long: take the columns of each by itself
                self._fill_from(offset + index * row, shape[1:], box[1:], out[index - box[0][0]])
        else:
            step = ROWS_BYTES // (row * size)  # rows are short: read several whole ones, and copy the columns
            columns = as_slices(box[1:])
            for start in range(*box[0], step):
                count = min(step, box[0][1] - start)
                rows = torch.empty((count, *shape[1:]), dtype=self.dtype)
                self.extent.read((offset + start * row) * size, as_bytes(rows))
                out[start - box[0][0] :][:count] = rows[(slice(None), *columns)]


@lru_cache  # the same few shapes in all blocks
def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _is_one_run(box: Box, shape: tuple[int, ...]) -> bool:
    """Whether the box's elements are consecutive: single indices, then one range, then whole dimensions."""
    lengths = [stop - start for start, stop in box]
    partial = [dim for dim, (length, size) in enumerate(zip(lengths, shape, strict=True)) if length != size]
    return not partial or all(length == 1 for length in lengths[: partial[-1]])


@dataclass(frozen=True)
class Tile:
    """A rectangular part of a tensor, and the index where it begins."""

    start: tuple[int, ...]
    part: TensorRef


def tiled(name: str, tiles: Sequence[Tile], shape: tuple[int, ...], dtype_name: str) -> TensorRef:
    """The tensor that the tiles make up. Raises CheckpointError unless they cover it exactly once.

    The tiles must come from cuts across a whole part: the tensor along one dimension, the results along another, and so
    on, as tensor parallelism and sharding cut. For instance, first by columns, then the left part by rows:

        +---+-----+
        | A |     |
        +---+  C  |        join([join([A, B], dim 0), C], dim 1)
        | B |     |
        +---+-----+
    """
    if len(tiles) == 1 and tiles[0].part.shape == shape and tiles[0].start == (0,) * len(shape):
        return tiles[0].part
    filled = [tile for tile in tiles if prod(tile.part.shape)]
    if not filled and not prod(shape):
        return Zeros(shape, dtype_name)

    def joined(some: list[Tile], start: tuple[int, ...], stop: tuple[int, ...]) -> TensorRef:
        """The part from `start` to `stop`, joined along the first dimension that separates its tiles."""
        if len(some) == 1 and some[0].start == start and _ends(some[0]) == stop:
            return some[0].part
        for dim in range(len(shape)):
            groups: list[list[Tile]] = []  # tiles that overlap in this dimension
            end = 0
            for tile in sorted(some, key=lambda tile: tile.start[dim]):
                if not groups or tile.start[dim] >= end:
                    groups.append([])
                groups[-1].append(tile)
                end = max(end, _ends(tile)[dim])
            if len(groups) > 1:
                cuts = [start[dim], *(group[0].start[dim] for group in groups[1:]), stop[dim]]
                ends = zip(groups, cuts, cuts[1:], strict=False)
                return join([joined(g, _put(start, dim, a), _put(stop, dim, b)) for g, a, b in ends], dim)
        covered = sum(prod(tile.part.shape) for tile in tiles)
        raise CheckpointError(
            f"{name}: its {len(tiles)} parts, which hold {covered} elements, do not make up a tensor of shape "
            f"{list(shape)}, which has {prod(shape)}"
        )

    if any(len(tile.start) != len(shape) or len(tile.part.shape) != len(shape) for tile in filled):
        raise CheckpointError(f"{name}: a part of it has another number of dimensions than shape {list(shape)}")
    return joined(filled, (0,) * len(shape), shape)


def _ends(tile: Tile) -> tuple[int, ...]:
    return tuple(start + size for start, size in zip(tile.start, tile.part.shape, strict=True))


def _put(numbers: tuple[int, ...], dim: int, number: int) -> tuple[int, ...]:
    return (*numbers[:dim], number, *numbers[dim + 1 :])


@contextmanager
def verifying(tensors: Iterable[TensorRef]) -> Iterator[None]:
    """A context in which blocks of these tensors may be used before their checksums are complete.

    Checksums are computed while blocks are read, and all blocks are verified when the context ends: only then may
    anything that was made from the tensors be trusted. Raises CheckpointError for damage.
    """
    extents = extents_of(tensors)
    for extent in extents:
        extent.deferred = True
    try:
        yield
        for extent in extents:
            extent.finish()
    finally:
        for extent in extents:
            extent.deferred = False


def read_past_cache(tensors: Iterable[TensorRef]) -> None:
    """From now on, read large parts of these tensors past the page cache."""
    for extent in extents_of(tensors):
        extent.direct = True


def verify(tensors: Iterable[TensorRef]) -> None:
    """Verify all blocks of these tensors, reading those that are not verified. Raises CheckpointError for damage."""
    for extent in extents_of(tensors):
        extent.verify()


def extents_of(tensors: Iterable[TensorRef]) -> list[Extent]:
    """The extents that these tensors are read from, each once."""
    extents = (leaf.extent for leaf in leaves(tensors) if isinstance(leaf, FileTensor))
    return list({id(extent): extent for extent in extents}.values())
