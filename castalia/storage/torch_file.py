"""Open files of `torch.save` without reading their tensors.

`open_pt` reads the zip directory and the pickle, and returns the pickled object with a `FileTensor` in place of every
tensor. It understands zip archives (torch 1.6 and later) and the older plain format. A zip member's checksum is
verified when its tensor is read.
"""

from __future__ import annotations

import mmap
import os
import struct
import zipfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from castalia.errors import CheckpointError, refuse_pointer
from castalia.storage.extent import Extent, FileTensor
from castalia.storage.lazy import ITEM_BYTES
from castalia.storage.unpickle import unpickle

MAX_PICKLE_BYTES = 256 << 20  # enough for names and shapes of a million tensors
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, ..., lengths of name and extra field
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


@dataclass(frozen=True)
class _Storage:
    """The bytes of a storage, from which a pickle makes tensors (see `castalia.storage.unpickle.Storage`)."""

    extent: Extent
    dtype: str
    size: int  # elements

    def tensor(self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: str | None) -> FileTensor:
        """Raises CheckpointError for a view that does not fit into the storage."""
        # A pickle may view a storage in another dtype.
        size = self.size * ITEM_BYTES[self.dtype] // ITEM_BYTES[dtype or self.dtype]
        numbers = (offset, *shape, *stride)
        if len(shape) != len(stride) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"a tensor at {offset} with shape {shape} and strides {stride}")
        last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
        count: int = prod(shape)
        if count > size or (count and last >= size):
            raise CheckpointError(
                f"{self.extent.path} is damaged: a tensor of shape {shape}, strides {stride}, at element {offset} "
                f"does not fit into its storage of {size} elements"
            )
        return FileTensor(self.extent, dtype or self.dtype, shape, stride, offset)


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
        f"{path} was not written by torch.save: it starts with {start[:8]!r}" if start else f"{path} is empty"
    )


def _open_zip(path: Path, file: Any) -> Any:
    members = _zip_members(path, file)
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:  # the archive's folder has any name
        raise CheckpointError(f"{path}: {len(pickles)} members named data.pkl where torch.save writes one")
    root = pickles[0].removesuffix("data.pkl")
    size = os.fstat(file.fileno()).st_size
    # `torch.serialization.set_crc32_options(False)` leaves out all checksums; if only some are missing, that is damage.
    with_sums = any(info.CRC for info in members.values())

    def extent(member: zipfile.ZipInfo) -> Extent:
        """The bytes of a member of this archive."""
        return _extent(path, file, member, size, with_sums)

    for name, member in members.items():
        if member is not members[pickles[0]] and not name.startswith(
            f"{root}data/"
        ):  # "version" and other small members
            extent(member).verify()
    order = members.get(root + "byteorder")
    if order and _content(extent(order)) != b"little":
        raise CheckpointError(f"{path} was written on a big-endian machine; only little-endian files can be read")
    if members[pickles[0]].file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{path}: refused: its pickle has {members[pickles[0]].file_size} bytes")
    extents: dict[str, Extent] = {}

    def storage(identity: Sequence) -> _Storage:
        """The member that a persistent id names."""
        key, dtype, count = _identity(identity)
        if key not in extents:
            member = members.get(f"{root}data/{key}")
            if member is None:
                raise CheckpointError(f"{path} is damaged: the storage {key!r} is missing")
            extents[key] = extent(member)
        if extents[key].size != count * ITEM_BYTES[dtype]:
            raise CheckpointError(
                f"{path} is damaged: storage {key!r} has {extents[key].size} bytes instead of {count} elements of "
                f"{dtype}"
            )
        return _Storage(extents[key], dtype, count)

    return unpickle(_content(extent(members[pickles[0]])), str(path), storage)[0]


def _zip_members(path: Path, file: Any) -> dict[str, zipfile.ZipInfo]:
    """The members by name. Raises CheckpointError for archives that torch.save does not write."""
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


def _content(extent: Extent) -> bytes:
    return bytes(extent.map(0, extent.size))


def _extent(path: Path, file: Any, info: zipfile.ZipInfo, file_size: int, with_sums: bool) -> Extent:
    """Where a member's bytes lie, after its local header, whose lengths may differ from the directory's."""
    header = os.pread(file.fileno(), LOCAL_HEADER.size, info.header_offset)
    if len(header) < LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"{path} is damaged: no header for {info.filename!r} at byte {info.header_offset}")
    _, name_size, extra_size = LOCAL_HEADER.unpack(header)
    offset = info.header_offset + LOCAL_HEADER.size + name_size + extra_size
    if offset + info.file_size > file_size:
        raise CheckpointError(f"{path} is truncated: {info.filename!r} ends beyond the file's {file_size} bytes")
    return Extent(path, offset, info.file_size, (info.CRC,) if with_sums else (), max(info.file_size, 1))


def _open_legacy(path: Path, file: Any) -> Any:
    """Five pickles one after another (magic number, version, system, object, storage keys), then the storages.

    Each storage is its number of elements in 8 bytes, then its plain bytes. Source: `torch.serialization._legacy_save`.
    """
    extents: dict[str, tuple[Extent, str, int]] = {}

    def storage(identity: Sequence) -> _Storage:
        """The storage that a persistent id names; where it lies is known only at the end of the file."""
        key, dtype, count = _identity(identity)
        if len(identity) > 5 and identity[5] is not None:
            raise CheckpointError(f"{path}: storages that are views of others (torch 0.3) cannot be read")
        # The extent is filled in below, when the order of the storages is known.
        extent, *known = extents.setdefault(key, (Extent(path, 0, 0), dtype, count))
        if known != [dtype, count]:
            raise CheckpointError(f"{path} is damaged: storage {key!r} is there in two sizes or types")
        return _Storage(extent, dtype, count)

    with closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as data:
        parts, at = [], 0
        for _ in range(5):
            part, at = unpickle(data, str(path), storage, at)
            parts.append(part)
        magic, _, system, result, keys = parts
        if magic != LEGACY_MAGIC or not isinstance(system, dict) or not system.get("little_endian"):
            raise CheckpointError(f"{path} was written on a big-endian machine or is damaged")
        if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(extents):
            raise CheckpointError(f"{path} is damaged: its list of storages does not fit its tensors")
        for key in keys:
            extent, dtype, count = extents[str(key)]
            stored = int.from_bytes(data[at : at + 8], "little")
            extent.offset, extent.size = at + 8, count * ITEM_BYTES[dtype]
            at = extent.offset + extent.size
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
