"""CRC-32, zlib's: zlib-ng computes it several times faster than Python's own module, where it is installed."""

from __future__ import annotations

from dataclasses import dataclass, field

try:
    from zlib_ng.zlib_ng import crc32
except ImportError:
    from zlib import crc32

__all__ = ["BLOCK_BYTES", "BlockSums", "crc32"]

BLOCK_BYTES = 1 << 20  # of our own files: what is read to verify one byte


@dataclass
class BlockSums:
    """The checksums of consecutive bytes, block by block, as they are written."""

    found: list[int] = field(default_factory=list)
    seen: int = 0  # bytes

    def add(self, data: memoryview) -> None:
        while data:
            begun = self.seen % BLOCK_BYTES
            part = data[: BLOCK_BYTES - begun]
            if begun:
                self.found[-1] = crc32(part, self.found[-1])
            else:
                self.found.append(crc32(part))
            self.seen += len(part)
            data = data[len(part) :]
