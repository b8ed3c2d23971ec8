"""CRC-32, zlib's: zlib-ng computes it several times faster than Python's own module, where it is installed."""

try:
    from zlib_ng.zlib_ng import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]
