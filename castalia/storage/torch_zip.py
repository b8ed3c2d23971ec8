"""Write zip archives as `torch.save` does: members are not compressed and begin at multiples of 64 bytes.

Members are streamed. Python's zipfile could do the same, but its own checksums take longer than the writing.
Layout: PKWARE's .ZIP File Format Specification 6.3.10, sections 4.3.7 (local headers), 4.3.12 to 4.3.16 (directory).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import BinaryIO

from castalia.bars import Tally
from castalia.storage.checksum import crc32
from castalia.storage.safetensors import SLICE_BYTES

ALIGNMENT = 64
IN_64_BITS = 0xFFFFFFFF  # in place of a number that needs 64 bits, which an extra field has then
WIDE = IN_64_BITS  # the first such number
LOCAL = struct.Struct("<4s5H3L2H")
ENTRY = struct.Struct("<4s6H3L5H2L")
END_64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR = struct.Struct("<4sLQL")
END = struct.Struct("<4s4H2LH")
VERSION, UTF8_NAMES, STORED, TIME, DATE = (
    45,
    0x800,
    0,
    0,
    0x21,
)  # version 4.5 has 64-bit sizes; midnight, January 1, 1980


@dataclass
class StoredZip:
    """An archive that is being written."""

    file: BinaryIO  # new, open for writing
    entries: list[bytes] = field(default_factory=list)  # of the directory

    def add(self, name: str, size: int, pieces: Iterable[memoryview], advance: Tally) -> None:
        """Write a member of `size` bytes. Raises ValueError if the pieces have another size together."""
        start, encoded = self.file.tell(), name.encode()
        sizes = struct.pack("<2H2Q", 1, 16, size, size) if size >= WIDE else b""
        padding = -(start + LOCAL.size + len(encoded) + len(sizes) + 4) % ALIGNMENT
        extra = sizes + b"FB" + struct.pack("<H", padding) + b"Z" * padding
        # The header needs the checksum, so it is written after the bytes.
        self.file.seek(start + LOCAL.size + len(encoded) + len(extra))
        crc = done = 0
        for piece in pieces:
            for at in range(0, len(piece), SLICE_BYTES):
                part = piece[at : at + SLICE_BYTES]
                self.file.write(part)
                crc = crc32(part, crc)
            done += len(piece)
            advance(len(piece))
        if done != size:
            raise ValueError(f"{name} has {done} bytes instead of {size}")
        end = self.file.tell()
        self.file.seek(start)
        short = _short(size)
        common = (VERSION, UTF8_NAMES, STORED, TIME, DATE, crc, short, short, len(encoded))
        self.file.write(LOCAL.pack(b"PK\3\4", *common, len(extra)) + encoded + extra)
        self.file.seek(end)
        self._enter(common, start, size, encoded)

    def _enter(self, common: tuple[int, ...], start: int, size: int, name: bytes) -> None:
        wide = [*([size, size] if size >= WIDE else []), *([start] if start >= WIDE else [])]
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        entry = ENTRY.pack(b"PK\1\2", VERSION, *common, len(extra), 0, 0, 0, 0, _short(start))
        self.entries.append(entry + name + extra)

    def finish(self) -> None:
        """Write the directory, always with the record of 64-bit numbers, as torch does."""
        start, count, directory = self.file.tell(), len(self.entries), b"".join(self.entries)
        end = start + len(directory)
        self.file.write(directory)
        record = (END_64.size - 12, VERSION, VERSION, 0, 0, count, count, len(directory), start)
        self.file.write(END_64.pack(b"PK\6\6", *record) + LOCATOR.pack(b"PK\6\7", 0, end, 1))
        short = (min(count, 0xFFFF), min(count, 0xFFFF), _short(len(directory)), _short(start))
        self.file.write(END.pack(b"PK\5\6", 0, 0, *short, 0))


def _short(number: int) -> int:
    return number if number < WIDE else IN_64_BITS
