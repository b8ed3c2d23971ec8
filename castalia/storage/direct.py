"""Large reads that leave the page cache alone, for files that are larger than memory and read again and again.

The page cache drops what was used longest ago, which is the very next thing that a cyclic reader needs. So bytes go
from the disk into an aligned buffer of this thread and from there to their place (O_DIRECT, open(2)); where the file
system has no such reads, through the page cache, which is then told to forget them (posix_fadvise(2)).
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from pathlib import Path
from threading import local

import numpy as np
from typing_extensions import Self

ALIGNMENT = 4096  # of offsets, lengths and memory; a multiple of every disk's block
WINDOW_BYTES = 8 << 20  # read at once; `castalia.plan.stream_plan` counts it for each thread
_own = local()


def private_memory(num_bytes: int) -> mmap.mmap:
    """Zeroed memory that begins at a page, in huge pages where the system gives them."""
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # a kernel without huge pages, a system without the advice
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class BufferedFile:
    """A file read through the page cache."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def read_into(self, out: memoryview, offset: int) -> int:
        """Fill a beginning of `out` with the bytes from `offset` on. Returns their number, 0 at the file's end."""
        return os.preadv(self.descriptor, [out], offset)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self.descriptor).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.descriptor)


class DirectFile(BufferedFile):
    """A file of which bytes up to `stop` are read, in order and past the page cache."""

    def __init__(self, path: Path, stop: int) -> None:
        super().__init__(path)
        self.stop, self.first, self.data = stop, 0, memoryview(b"")
        self.is_direct = False
        with suppress(OSError):  # the file system has no direct reads
            aside = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
            os.close(self.descriptor)
            self.descriptor, self.is_direct = aside, hasattr(os, "O_DIRECT")
        self.path = path

    def read_into(self, out: memoryview, offset: int) -> int:
        """See `BufferedFile`. Reads a window ahead, of which later calls take their parts."""
        if not self.first <= offset < self.first + len(self.data):
            self._fill(offset)
        part = self.data[offset - self.first :][: len(out)]
        np.copyto(np.frombuffer(out, np.uint8)[: len(part)], np.frombuffer(part, np.uint8))  # without Python's lock
        return len(part)

    def _fill(self, offset: int) -> None:
        self.first = offset - offset % ALIGNMENT
        wanted = self.stop + -self.stop % ALIGNMENT - self.first
        window = _window()[: wanted if offset < self.stop else None]  # what is beyond `stop` is read for its checksum
        try:
            count = os.preadv(self.descriptor, [window], self.first)
        except OSError:
            if not self.is_direct:
                raise
            os.close(self.descriptor)  # some file systems open a file for direct reads, and then refuse them
            self.descriptor, self.is_direct = os.open(self.path, os.O_RDONLY), False
            count = os.preadv(self.descriptor, [window], self.first)
        if not self.is_direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, self.first, count, os.POSIX_FADV_DONTNEED)
        self.data = window[:count]


def _window() -> memoryview:
    """This thread's buffer, made at its first read."""
    if not hasattr(_own, "window"):
        _own.window = memoryview(private_memory(WINDOW_BYTES))
    return _own.window
