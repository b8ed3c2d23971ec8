"""GGUF files: typed metadata, a table of tensors, and their bytes, as the programs built on ggml read them.

Source: docs/gguf.md at ggml-org/ggml. The dimensions of a tensor stand in the file from the last to the first. The
format has no place for checksums; what can be checked is that every range lies in the file and overlaps no other.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from castalia.bars import Tally
from castalia.errors import CheckpointError
from castalia.storage.derived import Wrapper
from castalia.storage.extent import Extent, FileTensor
from castalia.storage.lazy import Box, ByteRun, TensorRef, as_bytes, as_slices
from castalia.storage.safetensors import SLICE_BYTES, write_all

if TYPE_CHECKING:
    import torch

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT = 32  # of each tensor's bytes, unless `general.alignment` says otherwise
BLOCK, BLOCK_BYTES = 32, 34  # q8_0: so many values share one fp16 scale, which stands before their bytes
TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}  # of tensors, by ggml's names
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
OTHER_TYPES = {  # that we meet and cannot read
    2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 10: "q2_K", 11: "q3_K", 12: "q4_K", 13: "q5_K", 14: "q6_K", 15: "q8_K",
}  # fmt: skip
# Numbers and formats (of `struct`) of the types of values. Texts and arrays come with their lengths.
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}
HEADER_BYTES = (1 << 20, 1 << 24, 1 << 28)  # read at first, and again if the header goes on; it cannot be longer
LEAST_VALUE, LEAST_ENTRY, LEAST_TEXT = 13, 24, 8  # bytes of the shortest key with its value, tensor's entry, text
MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class Stored:
    """A tensor to be written, and the type in which it is stored: a key of `TYPES`.

    `ref` has the dtype of the type; for q8_0 it is in fp32, and its rows are multiples of `BLOCK`.
    """

    ref: TensorRef
    type: str

    @property
    def num_bytes(self) -> int:
        """The size in the file."""
        return prod(self.ref.shape) // BLOCK * BLOCK_BYTES if self.type == "q8_0" else self.ref.num_bytes


class GgufFile:
    """A file to be written. Its header is made at once; tensors are read, a piece at a time, by `write`.

    Values of the metadata are truth values, whole numbers (written as u32), floats (as f32), texts, and lists of texts
    or numbers (as i32 or f32).
    """

    def __init__(self, metadata: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
        self.stored = dict(tensors)
        values = b"".join(_text(key) + _value(value) for key, value in metadata.items())
        entries, end = [], 0
        for name, each in self.stored.items():
            shape = each.ref.shape[::-1]
            dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            entries.append(_text(name) + dimensions + struct.pack("<IQ", TYPES[each.type], end))
            end += each.num_bytes + _padding(each.num_bytes)
        head = MAGIC + struct.pack("<IQQ", VERSION, len(self.stored), len(metadata))
        head += values + b"".join(entries)
        self.header = head + bytes(_padding(len(head)))
        self.num_bytes = len(self.header) + end
        self.tensors = tuple(each.ref for each in self.stored.values())

    def write(self, path: Path, advance: Tally) -> None:
        """Write the file; it is not on disk yet. Raises OSError, what reading raises, and CheckpointError for values
        that q8_0 cannot hold."""
        with open(path, "wb", buffering=0) as file:
            _write(file, memoryview(self.header), advance)
            for name, each in self.stored.items():
                for piece in each.ref.pieces():
                    data = _quantized(piece, name) if each.type == "q8_0" else piece
                    _write(file, as_bytes(data), advance)
                _write(file, memoryview(bytes(_padding(each.num_bytes))), advance)


def _write(file: Any, data: memoryview, advance: Tally) -> None:
    for start in range(0, len(data), SLICE_BYTES):
        part = data[start : start + SLICE_BYTES]
        write_all(file, part)
        advance(len(part))


def _padding(size: int) -> int:
    return -size % ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A value with its type in front."""
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", U32, value)
    if isinstance(value, float):
        return struct.pack("<If", F32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    kind = STRING if not value or isinstance(value[0], str) else F32 if isinstance(value[0], float) else I32
    head = struct.pack("<IIQ", ARRAY, kind, len(value))
    if kind == STRING:
        return head + b"".join(map(_text, value))
    return head + np.array(value, "<f4" if kind == F32 else "<i4").tobytes()


def quantize(values: torch.Tensor) -> torch.Tensor:
    """fp32 values [..., n] as q8_0: uint8 [..., n / BLOCK * BLOCK_BYTES].

    The values of a block are multiples of its scale, largest / 127, rounded half away from zero (ggml-quants.c).
    """
    import torch

    blocks = values.contiguous().view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    multiples = blocks * torch.where(scale == 0, scale, 1 / scale)
    size = multiples.abs()
    whole = size.floor()
    rounded = multiples.sign() * (whole + (2 * (size - whole)).floor())
    small = torch.from_numpy(rounded.numpy().astype(np.int8).view(np.uint8))
    return torch.cat((scale.half().view(torch.uint8), small), 1).view(*values.shape[:-1], -1)


def dequantize(packed: torch.Tensor) -> torch.Tensor:
    """The fp32 values [..., n] of q8_0's bytes [..., n / BLOCK * BLOCK_BYTES]."""
    import torch

    blocks = packed.contiguous().view(-1, BLOCK_BYTES)
    scale = blocks[:, :2].contiguous().view(torch.float16).float()
    small = torch.from_numpy(blocks[:, 2:].numpy().view(np.int8).astype(np.float32))
    return (small * scale).view(*packed.shape[:-1], -1)


def _quantized(values: torch.Tensor, name: str) -> torch.Tensor:
    largest = float(values.abs().max())
    if not largest / 127 < 65520:  # what fp16 rounds to infinity; also NaN
        raise CheckpointError(f"{name}: q8_0 cannot hold a value of {largest}; choose --dtype f32 or bf16")
    return quantize(values)


@dataclass(frozen=True, repr=False)
class Rounded(Wrapper):
    """A matrix with the values that q8_0 gives it, in fp32."""

    source: TensorRef
    dtype_name = "float32"

    def _take(self, box: Box) -> torch.Tensor:
        rows = self.source.read([*as_slices(box[:-1])]).float()  # whole rows, which consist of whole blocks
        return dequantize(quantize(rows))[..., slice(*box[-1])]


@dataclass(frozen=True, repr=False)
class QuantizedTensor(Wrapper):
    """A matrix that is stored as q8_0, read as fp32."""

    source: FileTensor  # [rows, bytes], uint8
    dtype_name = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        """See `TensorRef`."""
        return self.source.shape[0], self.source.shape[1] // BLOCK_BYTES * BLOCK

    def runs(self) -> list[ByteRun]:
        """None, as the bytes are no values of a dtype that others know."""
        return []

    def _take(self, box: Box) -> torch.Tensor:
        return dequantize(self.source.read([slice(*box[0])]))[:, slice(*box[1])]


@dataclass(frozen=True)
class Gguf:
    """What a file holds. No tensor is read yet."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorRef]


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a file which begins as GGUF files do."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == MAGIC


def open_gguf(path: Path) -> Gguf:
    """Read the metadata and the table of tensors. Raises CheckpointError for what is truncated, damaged or not ours."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            for length in HEADER_BYTES:
                file.seek(0)
                try:
                    return _parsed(path, memoryview(file.read(min(size, length))), size)
                except _TooShort:
                    continue
        raise _endless(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


class _TooShort(Exception):
    """The header goes on behind the bytes that were read."""


def _endless(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or damaged: its header does not end within it")


class _Cursor:
    """Reads one value after another from the beginning of a file of `size` bytes, of which `data` are read."""

    def __init__(self, path: Path, data: memoryview, size: int) -> None:
        self.path, self.data, self.at, self.limit = path, data, 0, min(size, HEADER_BYTES[-1])

    def expect(self, count: int) -> None:
        """Raises CheckpointError if so many bytes more cannot be in the header: a count is damaged."""
        if self.at + count > self.limit:
            raise _endless(self.path)

    def take(self, count: int) -> memoryview:
        """The next bytes."""
        self.expect(count)
        if self.at + count > len(self.data):
            raise _TooShort
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        """The next number, by the format that `struct` has for it."""
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def text(self) -> str:
        """The next text. Raises CheckpointError if it is not UTF-8."""
        start = self.at
        try:
            return bytes(self.take(self.number("Q"))).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path} is damaged: the text at byte {start} is not UTF-8") from error

    def value(self) -> Any:
        """The next value of the metadata, after its type."""
        kind = self.number("I")
        if kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind == STRING:
                self.expect(LEAST_TEXT * count)
                return [self.text() for _ in range(count)]
            form = self.form(kind)
            return list(struct.unpack(f"<{count}{form}", self.take(count * struct.calcsize("<" + form))))
        return self.text() if kind == STRING else self.number(self.form(kind))

    def form(self, kind: int) -> str:
        """The format of a scalar type. Raises CheckpointError for types that the format does not have."""
        if kind not in SCALARS:
            raise CheckpointError(f"{self.path} is damaged: type {kind} at byte {self.at} is unknown")
        return SCALARS[kind]


def _parsed(path: Path, header: memoryview, size: int) -> Gguf:
    cursor = _Cursor(path, header, size)
    if bytes(cursor.take(4)) != MAGIC or (version := cursor.number("I")) not in (2, VERSION):
        raise CheckpointError(f"{path} is not a GGUF file of version 2 or 3, whose bytes are in little-endian order")
    del version
    num_tensors, num_values = cursor.number("Q"), cursor.number("Q")
    cursor.expect(LEAST_VALUE * num_values + LEAST_ENTRY * num_tensors)
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.text()
        metadata[key] = cursor.value()
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(num_tensors):
        name, dimensions = cursor.text(), cursor.number("I")
        if dimensions > MAX_DIMENSIONS or name in entries:
            raise CheckpointError(
                f"{path} is damaged: its entry for {name} has {dimensions} dimensions, or is a second"
            )
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        entries[name] = shape, cursor.number("I"), cursor.number("Q")
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment <= 0:
        raise CheckpointError(f"{path}: general.alignment is {alignment!r}, which is no number of bytes")
    base = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorRef] = {}
    end = base
    for name, (shape, kind, offset) in sorted(entries.items(), key=lambda item: item[1][2]):
        tensors[name], num_bytes = _tensor(path, name, shape, kind, base + offset)
        if base + offset < end:
            raise CheckpointError(f"{path} is damaged: {name} begins at byte {base + offset}, inside another tensor")
        end = base + offset + num_bytes
        if end > size:
            raise CheckpointError(f"{path} is truncated: {size} bytes, but {name} ends at byte {end}")
    return Gguf(metadata, {name: tensors[name] for name in entries})


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int) -> tuple[TensorRef, int]:
    types = {number: type for type, number in TYPES.items()}
    if kind not in types:
        named = OTHER_TYPES.get(kind, f"type {kind}")
        raise CheckpointError(f"{path}: {name} is stored as {named}; {', '.join(TYPES)} are read here, no other types")
    if types[kind] != "q8_0":
        dtype = DTYPES[types[kind]]
        size = prod(shape) * (4 if dtype == "float32" else 2)
        return FileTensor.of(Extent(path, offset, size, name=name), dtype, shape), size
    if len(shape) != 2 or shape[1] % BLOCK:
        raise CheckpointError(f"{path} is damaged: {name} is stored as q8_0, with the shape {list(shape)}")
    row = shape[1] // BLOCK * BLOCK_BYTES
    packed = FileTensor.of(Extent(path, offset, shape[0] * row, name=name), "uint8", (shape[0], row))
    return QuantizedTensor(packed), shape[0] * row
