"""What this process may use of its machine: cores and memory."""

from __future__ import annotations

import os
import resource
from pathlib import Path

# The limit of this process's control group, in versions 2 and 1 of their interface.
GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def usable_cores() -> int:
    """Cores of this process: a container or `taskset` may allow fewer than the machine has; macOS does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_memory() -> int:
    """Bytes that the system could give away, caches included, else half of all there is; no more than set limits."""
    limits = [limit for file in GROUP_LIMITS if (limit := _group_limit(file)) is not None]
    own = resource.getrlimit(resource.RLIMIT_DATA)[0]
    return min([_free_in_system(), *limits, *([] if own == resource.RLIM_INFINITY else [own])])


def _free_in_system() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return total_memory() // 2


def _group_limit(file: str) -> int | None:
    try:
        return int(Path(file).read_text())
    except (OSError, ValueError):  # no such group, or the word "max"
        return None


def keep_freed_memory() -> None:
    """Stops glibc from returning the memory of logits to the system, page by page, after every step."""
    import ctypes
    import platform

    if platform.libc_ver()[0] != "glibc":
        return
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # the numbers that malloc.h gives them
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(mmap_max, 0)  # large blocks come from the heap, too,
    libc.mallopt(trim_threshold, 2**31 - 1)  # whose end is not given back,
    libc.mallopt(top_pad, 256 << 20)  # and which grows by 256 MiB at a time


def give_back_freed_memory() -> None:
    """The opposite: glibc returns large blocks at once, whose gaps in its heap would add up where memory is short."""
    import ctypes
    import platform

    if platform.libc_ver()[0] == "glibc":
        mmap_threshold = -3
        ctypes.CDLL("libc.so.6").mallopt(mmap_threshold, 4 << 20)  # a fixed one, which glibc no longer raises
