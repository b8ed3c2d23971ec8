"""Files of `torch.save`, opened without reading their tensors.

`open_pt` reads a file's directory and its pickle, and gives the pickled object with a `FileTensor` in place of every
tensor. Zip archives (torch 1.6 and later) and the older plain format are understood. Tensor bytes are read when
asked for; the first time that any part of a zip member is read, its checksum is verified.
"""

from __future__ import annotations

import io
import mmap
import os
import struct
import zipfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from castalia.checkpoint.checksum import crc32
from castalia.checkpoint.lazy import bounds
from castalia.checkpoint.tensors import ITEM_BYTES, Slices, Typed
from castalia.checkpoint.unpickle import unpickle
from castalia.errors import CheckpointError, refuse_pointer

if TYPE_CHECKING:
    import torch

MAX_PICKLE_BYTES = 256 << 20  # names and shapes of a million tensors
CHUNK_BYTES = 1 << 20  # read to be verified: it stays in the processor's cache
LOCAL_HEADER = struct.Struct("<4s22xHH")
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


@dataclass
class Blob:
    """Consecutive bytes of a file: one storage. What is read is verified: by default before the first use.

    Who sets `deferred` lets the checksum be computed on the way, while the bytes are read one after another, and calls
    `finish` before anything made of them counts as good.
    """

    path: Path
    offset: int
    size: int
    crc32: int = 0  # 0: none was written
    deferred: bool = field(default=False, compare=False)
    seen: int = field(default=0, compare=False)  # bytes, from the first on
    seen_crc32: int = field(default=0, compare=False)  # of these
    lock: Lock = field(default_factory=Lock, compare=False, repr=False)

    @property
    def verified(self) -> bool:
        return not self.crc32 or self.seen == self.size

    def read(self, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes from `start` on.

        Raises CheckpointError when the file is shorter now or the checksum does not fit.
        """
        next_in_order = start == self.seen and (self.deferred or len(out) == self.size)
        again = self.deferred and start + len(out) <= self.seen
        if not (self.verified or next_in_order or again):
            self.verify()
        with self._open(start) as file:
            done = 0
            while done < len(out):
                if not (count := file.readinto(out[done:])):
                    raise self._truncated(start + done)
                done += count
        with self.lock:
            if not self.verified and start == self.seen:
                self._see(out)

    def map(self) -> np.memmap:
        """The bytes, verified. Errors as for `read`."""
        with self._open() as file:
            if (found := os.fstat(file.fileno()).st_size - self.offset) < self.size:
                raise self._truncated(found)
        if not self.verified:
            self.verify()
        return np.memmap(self.path, np.uint8, "r", self.offset, (self.size,))

    def verify(self) -> None:
        """Read what was not seen yet. Errors as for `read`."""
        with self.lock, self._open(self.seen) as file:
            buffer = memoryview(bytearray(min(CHUNK_BYTES, self.size - self.seen)))
            while not self.verified:
                if not (count := file.readinto(buffer[: self.size - self.seen])):
                    raise self._truncated(self.seen)
                self._see(buffer[:count])

    def finish(self) -> None:
        """Verify the rest if some of the bytes were used. Errors as for `read`."""
        if self.seen and not self.verified:
            self.verify()

    def _open(self, start: int = 0) -> io.FileIO:
        try:
            file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - the caller closes it
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error
        file.seek(self.offset + start)
        return file

    def _see(self, data: memoryview) -> None:
        crc = crc32(data, self.seen_crc32)
        if self.seen + len(data) == self.size and crc != self.crc32:
            raise CheckpointError(
                f"{self.path} is damaged: bytes {self.offset} to {self.offset + self.size} have checksum {crc:08x}, "
                f"{self.crc32:08x} was written. Use another copy of this file or another step"
            )
        self.seen, self.seen_crc32 = self.seen + len(data), crc

    def _truncated(self, found: int) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is truncated: {self.offset + found} bytes, a tensor ends at {self.offset + self.size}"
        )


@dataclass(frozen=True)
class FileTensor(Typed):
    """A tensor in a file: a view of a storage, which may be larger. Offset and strides count elements."""

    blob: Blob
    dtype_name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    def read(self, slices: Slices | None = None) -> torch.Tensor:
        import torch

        box = bounds(self.shape, slices)
        lengths = [stop - start for start, stop in box]
        out = torch.empty(lengths, dtype=self.dtype)
        if out.numel():
            integers, size = as_integers(out), ITEM_BYTES[self.dtype_name]
            first = self.offset + sum(start * step for (start, _), step in zip(box, self.stride, strict=True))
            if out.stride() == self.stride:  # consecutive in the file, too
                self.blob.read(first * size, integers.reshape(-1).view(np.uint8).data)
                return out
            strides = [step * size for step in self.stride]
            data = self.blob.map()[first * size :]
            np.copyto(integers, np.ndarray(lengths, integers.dtype, data, strides=strides))
        return out


@dataclass(frozen=True)
class _Storage:
    blob: Blob
    dtype: str
    size: int  # elements

    def tensor(self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: str | None) -> FileTensor:
        size = self.size * ITEM_BYTES[self.dtype] // ITEM_BYTES[dtype or self.dtype]
        numbers = (offset, *shape, *stride)
        if len(shape) != len(stride) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"a tensor at {offset} with shape {shape} and strides {stride}")
        last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
        count: int = prod(shape)
        if count > size or (count and last >= size):
            raise CheckpointError(
                f"{self.blob.path} is damaged: a tensor of shape {shape}, strides {stride}, at element {offset} "
                f"does not fit into its storage of {size} elements"
            )
        return FileTensor(self.blob, dtype or self.dtype, shape, stride, offset)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def as_integers(tensor: torch.Tensor) -> np.ndarray:
    """The bits of a CPU tensor of any dtype, shared: integers of the same size. NumPy has no bfloat16."""
    import torch

    return tensor.view(getattr(torch, f"int{8 * tensor.dtype.itemsize}")).numpy()


def open_pt(path: Path | str) -> Any:
    """The object that `torch.save` put into the file, with a `FileTensor` for every tensor.

    Raises CheckpointError for files that are missing, truncated, damaged or unsafe.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(64)
            if start.startswith(b"PK"):
                return _open_zip(path, file)
            if start.startswith(LEGACY_START):
                return _open_legacy(path, file)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    refuse_pointer(path, start, CheckpointError)
    raise CheckpointError(
        f"{path} is no file of torch.save: it starts with {start[:8]!r}" if start else f"{path} is empty"
    )


def _open_zip(path: Path, file: Any) -> Any:
    members = _zip_members(path, file)
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{path}: {len(pickles)} members named data.pkl where torch.save writes one")
    root = pickles[0].removesuffix("data.pkl")
    size = os.fstat(file.fileno()).st_size
    order = members.get(root + "byteorder")
    if order and bytes(_blob(path, file, order, size).map()) != b"little":
        raise CheckpointError(f"{path} was written on a big-endian machine; only little-endian files can be read")
    if members[pickles[0]].file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{path}: refused: its pickle has {members[pickles[0]].file_size} bytes")
    blobs: dict[str, Blob] = {}

    def storage(identity: Sequence) -> _Storage:
        key, dtype, count = _identity(identity)
        if key not in blobs:
            member = members.get(f"{root}data/{key}")
            if member is None:
                raise CheckpointError(f"{path} is damaged: the storage {key!r} is missing")
            blobs[key] = _blob(path, file, member, size)
        if blobs[key].size != count * ITEM_BYTES[dtype]:
            raise CheckpointError(
                f"{path} is damaged: storage {key!r} has {blobs[key].size} bytes instead of {count} elements of {dtype}"
            )
        return _Storage(blobs[key], dtype, count)

    return unpickle(bytes(_blob(path, file, members[pickles[0]], size).map()), str(path), storage)[0]


def _zip_members(path: Path, file: Any) -> dict[str, zipfile.ZipInfo]:
    try:
        infos = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged: its zip directory cannot be read ({error}). "
            "Get this file again, or use another step"
        ) from error
    members = {}
    for info in infos:
        name = info.filename
        if name.startswith(("/", "\\")) or ":" in name.split("/")[0] or ".." in name.replace("\\", "/").split("/"):
            raise CheckpointError(f"{path}: refused: the archive has a member named {name!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise CheckpointError(f"{path}: refused: {name!r} is compressed or encrypted, which torch.save never does")
        if name in members:
            raise CheckpointError(f"{path}: refused: two members named {name!r}")
        members[name] = info
    if (total := sum(info.file_size for info in infos)) > os.fstat(file.fileno()).st_size:
        raise CheckpointError(f"{path}: refused: its members claim {total} bytes, more than the file has")
    return members


def _blob(path: Path, file: Any, info: zipfile.ZipInfo, file_size: int) -> Blob:
    """Where a stored member's bytes lie. The local header's lengths may differ from the directory's."""
    header = os.pread(file.fileno(), LOCAL_HEADER.size, info.header_offset)
    if len(header) < LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"{path} is damaged: no header for {info.filename!r} at byte {info.header_offset}")
    _, name_size, extra_size = LOCAL_HEADER.unpack(header)
    offset = info.header_offset + LOCAL_HEADER.size + name_size + extra_size
    if offset + info.file_size > file_size:
        raise CheckpointError(f"{path} is truncated: {info.filename!r} ends beyond the file's {file_size} bytes")
    return Blob(path, offset, info.file_size, info.CRC)


def _open_legacy(path: Path, file: Any) -> Any:
    """Five pickles one after another (magic number, version, system, object, storage keys), then the storages."""
    blobs: dict[str, tuple[Blob, str, int]] = {}

    def storage(identity: Sequence) -> _Storage:
        key, dtype, count = _identity(identity)
        if len(identity) > 5 and identity[5] is not None:
            raise CheckpointError(f"{path}: storages that are views of others (torch 0.3) cannot be read")
        blob, *_ = blobs.setdefault(key, (Blob(path, 0, 0), dtype, count))
        return _Storage(blob, dtype, count)

    with closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as data:
        parts, at = [], 0
        for _ in range(5):
            part, at = unpickle(data, str(path), storage, at)
            parts.append(part)
        magic, _, system, result, keys = parts
        if magic != LEGACY_MAGIC or not isinstance(system, dict) or not system.get("little_endian"):
            raise CheckpointError(f"{path} was written on a big-endian machine or is damaged")
        if not isinstance(keys, list) or set(map(str, keys)) != set(blobs):
            raise CheckpointError(f"{path} is damaged: its list of storages does not fit its tensors")
        for key in keys:
            blob, dtype, count = blobs[str(key)]
            stored = int.from_bytes(data[at : at + 8], "little")
            blob.offset, blob.size = at + 8, count * ITEM_BYTES[dtype]
            at = blob.offset + blob.size
            if at > len(data):
                raise CheckpointError(f"{path} is truncated: {len(data)} bytes, storage {key!r} ends at {at}")
            if stored != count:
                raise CheckpointError(f"{path} is damaged: storage {key!r} has {stored} elements instead of {count}")
    return result


def _identity(identity: Sequence) -> tuple[str, str, int]:
    """(key, dtype, elements) of a persistent id ('storage', class, key, location, elements, ...)."""
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        raise ValueError(f"persistent id {identity!r}")
    _, dtype, key, _, count = identity[:5]
    if dtype not in ITEM_BYTES or type(count) is not int or count < 0 or not isinstance(key, (str, int)):
        raise ValueError(f"persistent id {identity!r}")
    return str(key), dtype, count
