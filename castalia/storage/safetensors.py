"""Safetensors files: a JSON header with names, dtypes, shapes and byte ranges, then the tensors' plain bytes.

The format has no place for checksums; all that can be checked is that the byte ranges fill the file. Our own
checkpoints keep checksums of these files' blocks in a manifest. Source: the format's README at huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from castalia.bars import Tally, unseen
from castalia.errors import CheckpointError, refuse_pointer
from castalia.reading import keys, parse_json
from castalia.storage.checksum import BlockSums
from castalia.storage.extent import Extent, FileTensor
from castalia.storage.lazy import ITEM_BYTES, TensorRef, as_bytes

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
DTYPE_CODES = {name: code for code, name in DTYPES.items()}
MAX_HEADER_BYTES = 100 << 20
ALIGNMENT = 64  # of the first tensor's bytes: copies are much faster between equally aligned places
ENTRY: Any = keys({"dtype": str, "shape": list[int], "data_offsets": list[int]})  # `__metadata__` has texts instead
SLICE_BYTES = 1 << 20  # written at once: one checksum of a block, and larger pieces of the system's cache


@lru_cache  # all tensors of a file share one Path object
def safe_join(folder: Path, name: str) -> Path:
    """The path below `folder` that a name from a file means. Raises CheckpointError for names that lead out of it."""
    parts = name.replace("\\", "/").split("/")
    if not name or "\0" in name or name != name.strip() or parts[0] == "" or ".." in parts or ":" in parts[0]:
        raise CheckpointError(f"{folder}: a file in it names {name!r}, which is not a path inside this folder; refused")
    return folder / name


def open_safetensors(path: Path) -> dict[str, FileTensor]:
    """The tensors of a file by name; only the header is read.

    Raises CheckpointError for a file that is missing, truncated or malformed.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(64)
            refuse_pointer(path, start, CheckpointError)
            file.seek(8)
            length = int.from_bytes(start[:8], "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path} is not a safetensors file, or truncated: {size} bytes, header of {length}"
                )
            content = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    header = parse_json(content, f"{path}: the safetensors header", CheckpointError, dict[str, ENTRY])
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, fields, 8 + length) for name, fields in header.items()}
    _require_tiling(path, tensors, 8 + length, size)
    return tensors


def _entry(path: Path, name: str, fields: Mapping, base: int) -> FileTensor:
    """A tensor of the header. `base`: where the tensors' bytes begin in the file."""
    try:
        dtype, shape, (start, stop) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        numbers = all(type(number) is int and number >= 0 for number in (*shape, start, stop))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header's entry for {name} is malformed: {fields}") from error
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {dtype}; known are {', '.join(DTYPES)}")
    if not numbers or stop - start != math.prod(shape) * ITEM_BYTES[DTYPES[dtype]]:
        raise CheckpointError(f"{path}: {name} has shape {list(shape)} of {dtype}, but bytes {start} to {stop}")
    return FileTensor.of(Extent(path, base + start, stop - start), DTYPES[dtype], shape)


def _require_tiling(path: Path, tensors: Mapping[str, FileTensor], base: int, size: int) -> None:
    """Raises CheckpointError unless the tensors lie one after another and fill the file, as the format requires."""
    end = base
    for name, ref in sorted(tensors.items(), key=lambda item: (item[1].extent.offset, item[1].extent.size)):
        if ref.extent.offset != end:
            raise CheckpointError(
                f"{path} is damaged: its header says that {name} begins at byte {ref.extent.offset}, where what is "
                f"before it ends at byte {end}"
            )
        end += ref.extent.size
        if end > size:
            raise CheckpointError(f"{path} is truncated: {size} bytes, but {name} ends at byte {end}")
    if end != size:
        raise CheckpointError(f"{path} is damaged: {size} bytes, but its tensors end at byte {end}")


@dataclass(frozen=True)
class Written:
    """Where each tensor's bytes begin in a file, and the checksums of their blocks."""

    offsets: Mapping[str, int]
    sums: Mapping[str, Sequence[int]]


def write_safetensors(
    path: Path, tensors: Mapping[str, TensorRef], advance: Tally = unseen, checksums: bool = True
) -> Written:
    """Write a file, a piece of a tensor at a time; it is not on disk yet. Raises OSError, and what reading raises."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, ref in tensors.items():
        start, end = end, end + ref.num_bytes
        header[name] = {"dtype": DTYPE_CODES[ref.dtype_name], "shape": list(ref.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    base = 8 + len(text)
    sums = {name: BlockSums() for name in tensors}
    with open(path, "wb", buffering=0) as file:
        write_all(file, memoryview(len(text).to_bytes(8, "little") + text))
        for name, ref in tensors.items():
            for data in map(as_bytes, ref.pieces()):
                for start in range(0, len(data), SLICE_BYTES):
                    part = data[start : start + SLICE_BYTES]
                    write_all(file, part)
                    if checksums:
                        sums[name].add(part)
                    advance(len(part))
    offsets = {name: base + header[name]["data_offsets"][0] for name in tensors}
    return Written(offsets, {name: blocks.sums for name, blocks in sums.items()})


def write_all(file: BinaryIO, data: memoryview) -> None:
    """Write all bytes to an unbuffered file, whose `write` may take only some of them."""
    while data:
        data = data[file.write(data) :]
