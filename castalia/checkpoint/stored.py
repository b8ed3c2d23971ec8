"""Tensors that lie as plain bytes in files: the safetensors container, read by region and written with checksums."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from castalia.checkpoint.checksum import crc32
from castalia.checkpoint.container import as_integers
from castalia.checkpoint.lazy import bounds
from castalia.checkpoint.tensors import ITEM_BYTES, Slices, Typed, name_of
from castalia.errors import CheckpointError, refuse_pointer
from castalia.reading import keys, parse_json

if TYPE_CHECKING:
    import torch

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
DTYPE_CODES = {name: code for code, name in DTYPES.items()}
MAX_HEADER_BYTES = 100 << 20
ALIGNMENT = 64  # of the first tensor's bytes in the file: memory is copied much faster between places alike aligned
PIECE_BYTES = 1 << 20  # read or written at once: their checksum is computed while they are in the cache
SYNC_BYTES = 32 << 20  # written before the disk is told to begin

Region = Sequence[tuple[int, int]]  # first and one-past-last index of each dimension


@dataclass(frozen=True)
class Extent:
    """A rectangular part of a tensor, in row-major order, in one file."""

    path: Path
    offset: int  # of its first byte in the file
    start: tuple[int, ...]  # its first element in the whole tensor
    shape: tuple[int, ...]
    crc32: int | None = None


@dataclass(frozen=True)
class StoredTensor(Typed):
    """A tensor in one or more extents that cover it once. Reads only the bytes that are asked for."""

    name: str
    shape: tuple[int, ...]
    dtype_name: str
    extents: tuple[Extent, ...]

    def __post_init__(self) -> None:
        covered = sum(math.prod(extent.shape) for extent in self.extents)
        if covered != math.prod(self.shape):
            raise CheckpointError(
                f"{self.name}: its parts hold {covered} elements, "
                f"but shape {list(self.shape)} has {math.prod(self.shape)}"
            )

    def read(self, slices: Slices | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """A fresh CPU tensor, or `out` of the same shape and dtype filled.

        Raises CheckpointError for missing, truncated or damaged files.
        """
        import torch

        wanted = bounds(self.shape, slices)
        out = torch.empty([stop - start for start, stop in wanted], dtype=self.dtype) if out is None else out
        for extent in self.extents:
            try:
                if slices is None and extent.shape == self.shape and out.is_contiguous():
                    self._read_run(extent, 0, out)
                else:
                    self._read_part(extent, wanted, out)
            except OSError as error:
                raise CheckpointError(f"{self.name}: cannot read {extent.path}: {error.strerror}") from error
        return out

    def _read_part(self, extent: Extent, wanted: Region, out: torch.Tensor) -> None:
        """Fill the part of `out`, which is that region of the tensor, that lies in the extent."""
        import torch

        ends = zip(extent.start, extent.shape, wanted, strict=True)
        common = [(max(first, start), min(first + size, stop)) for first, size, (start, stop) in ends]
        if any(start >= stop for start, stop in common):
            return
        part = [(a - first, b - first) for (a, b), first in zip(common, extent.start, strict=True)]
        out = out[tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, wanted, strict=True))]
        if _is_one_run(part, extent.shape):
            buffer = out if out.is_contiguous() else torch.empty(out.shape, dtype=self.dtype)
            strides = [math.prod(extent.shape[dim + 1 :]) for dim in range(len(extent.shape))]
            skipped = sum(start * stride for (start, _), stride in zip(part, strides, strict=True))
            self._read_run(extent, skipped, buffer)
            if buffer is not out:
                out.copy_(buffer)
        else:
            self._check_size(extent)
            integers = as_integers(out)
            source = np.memmap(extent.path, integers.dtype, "r", extent.offset, extent.shape)
            np.copyto(integers, source[tuple(slice(*pair) for pair in part)])

    def _read_run(self, extent: Extent, skipped: int, buffer: torch.Tensor) -> None:
        """Consecutive elements after so many; the checksum is verified when they are the whole extent."""
        data, crc, done = as_bytes(buffer), 0, 0
        checked = extent.crc32 is not None and tuple(buffer.shape) == extent.shape
        first = extent.offset + skipped * ITEM_BYTES[self.dtype_name]
        file = os.open(extent.path, os.O_RDONLY)
        try:
            while done < len(data):
                count = os.preadv(file, [data[done : done + PIECE_BYTES]], first + done)
                if not count:
                    self._check_size(extent)
                if checked:
                    crc = crc32(data[done : done + count], crc)
                done += count
        finally:
            os.close(file)
        if checked:
            self._check_crc(extent, crc)

    def _check_crc(self, extent: Extent, crc: int) -> None:
        if crc != extent.crc32:
            end = extent.offset + math.prod(extent.shape) * ITEM_BYTES[self.dtype_name]
            raise CheckpointError(
                f"{self.name}: {extent.path} is damaged: bytes {extent.offset} to {end} have checksum {crc:08x}, "
                f"{extent.crc32:08x} was written. Use another step, or a copy of this file."
            )

    def _check_size(self, extent: Extent) -> None:
        needed = extent.offset + math.prod(extent.shape) * ITEM_BYTES[self.dtype_name]
        if (found := os.stat(extent.path).st_size) < needed:
            raise CheckpointError(
                f"{self.name}: {extent.path} is truncated: {found} bytes, but this tensor ends at byte {needed}. "
                "Use another step, or a copy of this file."
            )


def _is_one_run(part: Region, shape: tuple[int, ...]) -> bool:
    """Whether a part's elements are consecutive: single indices, then one range, then whole dimensions."""
    lengths = [stop - start for start, stop in part]
    partial = [dim for dim, (length, size) in enumerate(zip(lengths, shape, strict=True)) if length != size]
    return not partial or all(length == 1 for length in lengths[: partial[-1]])


@lru_cache  # the tensors of a file share its path
def inside(folder: Path, name: str) -> Path:
    """The path that a name read from a file means, below `folder`. Refuses names that lead out of it."""
    parts = name.replace("\\", "/").split("/")
    if not name or "\0" in name or name != name.strip() or parts[0] == "" or ".." in parts or ":" in parts[0]:
        raise CheckpointError(f"{folder}: a file in it names {name!r}, which is not a path inside this folder; refused")
    return folder / name


ENTRY: Any = keys({"dtype": str, "shape": list[int], "data_offsets": list[int]})  # and __metadata__, of texts


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared."""
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name. Only its header is read. Raises CheckpointError for a bad file."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(64)
            refuse_pointer(path, start, CheckpointError)
            file.seek(8)
            length = int.from_bytes(start[:8], "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{path}: no safetensors file, or truncated: {size} bytes, header of {length}")
            content = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    header = parse_json(content, f"{path}: the safetensors header", CheckpointError, dict[str, ENTRY])
    header.pop("__metadata__", None)
    return {name: _entry(path, name, fields, 8 + length, size) for name, fields in header.items()}


def _entry(path: Path, name: str, fields: Mapping, base: int, file_size: int) -> StoredTensor:
    try:
        dtype, shape, (start, stop) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        numbers = all(type(number) is int and number >= 0 for number in (*shape, start, stop))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header's entry for {name} is malformed: {fields}") from error
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {dtype}; known are {', '.join(DTYPES)}")
    if not numbers or stop - start != math.prod(shape) * ITEM_BYTES[DTYPES[dtype]]:
        raise CheckpointError(f"{path}: {name} has shape {list(shape)} of {dtype}, but bytes {start} to {stop}")
    if base + stop > file_size:
        raise CheckpointError(f"{path} is truncated: {file_size} bytes, but {name} ends at byte {base + stop}")
    return StoredTensor(name, shape, DTYPES[dtype], (Extent(path, base + start, (0,) * len(shape), shape),))


def write_safetensors(path: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, tuple[int, int]]:
    """Write contiguous CPU tensors, fsync, and return the (offset of the first byte, CRC-32) of each.

    Raises OSError, after which the file is incomplete.
    """
    tensors = list(tensors)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        code = DTYPE_CODES[name_of(tensor.dtype)]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    base = 8 + len(text)
    written = {}
    with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(1) as beside:
        _write_all(file.fileno(), memoryview(len(text).to_bytes(8, "little") + text))
        syncs: list[Future[None]] = []
        position = base
        for name, tensor in tensors:
            data, crc = as_bytes(tensor), 0
            for piece in (data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)):
                crc = crc32(piece, crc)
                _write_all(file.fileno(), piece)
                position += len(piece)
                if position >= SYNC_BYTES * (len(syncs) + 1):
                    syncs.append(beside.submit(os.fdatasync, file.fileno()))
            written[name] = (base + header[name]["data_offsets"][0], crc)
        for sync in syncs:
            sync.result()  # an error is told once only, so not by the last sync again
        os.fsync(file.fileno())
    return written


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
