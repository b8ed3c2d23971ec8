"""CRC-32 as in zlib. Where zlib-ng is installed, it computes the same several times faster than Python's module."""

from __future__ import annotations

from dataclasses import dataclass, field

try:
    from zlib_ng.zlib_ng import crc32
except ImportError:
    from zlib import crc32

__all__ = ["BLOCK_BYTES", "BlockSums", "crc32"]

BLOCK_BYTES = 1 << 20  # of our own files: the block that is read to verify one byte


@dataclass
class BlockSums:
    """The checksums of consecutive bytes, block by block, as they are written."""

    sums: list[int] = field(default_factory=list)
    seen: int = 0  # bytes

    def add(self, data: memoryview) -> None:
        """Continue with the next bytes, of any number."""
        while data:
            begun = self.seen % BLOCK_BYTES
            part = data[: BLOCK_BYTES - begun]
            if begun:
                self.sums[-1] = crc32(part, self.sums[-1])
            else:
                self.sums.append(crc32(part))
            self.seen += len(part)
            data = data[len(part) :]
