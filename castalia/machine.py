"""What this process may use of its machine: cores, memory, the user's cache; the processor's name; garbage."""

from __future__ import annotations

import gc
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Limit, use and statistics of this process's control group, and the part of its use that is cached files' and can be
# given away; in versions 2 and 1 of the interface.
GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def cache_folder() -> Path:
    """Where this user's programs keep what they can find out again; the folder need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "castalia"


def first_core() -> dict[str, str]:
    """What Linux says of the first core, such as "model name" and "flags"; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().partition("\n\n")[0].splitlines() if path.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def processor_name() -> str:
    """The processor's name for people; on ARM, whose cores have none, its kind."""
    return first_core().get("model name") or platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores of this process: a container or `taskset` may allow fewer than the machine has; macOS does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def allowed_memory() -> int:
    """Bytes of memory that the machine has, or that its limits allow this process where these are fewer."""
    limits = [most for group in GROUPS if (most := _limit_of_group(*group[:2])) is not None]
    return min([total_memory(), *limits, *_own_limit()])


def free_memory() -> int:
    """Bytes that the system could give away, caches included, else half of all there is; no more than limits leave."""
    left = [free for group in GROUPS if (free := _free_in_group(*group)) is not None]
    return min([_free_in_system(), *left, *_own_limit()])


def _own_limit() -> list[int]:
    own = resource.getrlimit(resource.RLIMIT_DATA)[0]
    return [] if own == resource.RLIM_INFINITY else [own]


def _limit_of_group(folder: str, limit: str) -> int | None:
    """The most that the control group allows; None without a limit."""
    try:
        return int(Path(folder, limit).read_text())
    except (OSError, ValueError):  # no such group, or the word "max"
        return None


def _free_in_system() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return total_memory() // 2


def _free_in_group(folder: str, limit: str, used: str, cached: str) -> int | None:
    """What the control group's limit leaves to this process and the others in the group; None without a limit."""
    try:
        most, now = (int(Path(folder, file).read_text()) for file in (limit, used))
        statistics = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
        return max(0, most - now + int(statistics.get(cached, 0)))
    except (OSError, ValueError):  # no such group, or the word "max"
        return None


@contextmanager
def importing_torch() -> Iterator[None]:
    """A context manager for the first import of torch: meanwhile Python does not look for garbage.

    What modules hold stays for good, and so is left out of later searches, too. Half a million objects, looked through
    again and again, would take a tenth of the time. Later imports, when other things exist as well, change nothing.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def keep_freed_memory() -> None:
    """Stops glibc from returning the memory of logits to the system, page by page, after every step."""
    if libc := _glibc():
        mmap_max, trim_threshold, top_pad = -4, -1, -2  # the numbers that malloc.h gives them
        libc.mallopt(mmap_max, 0)  # large blocks come from the heap, too,
        libc.mallopt(trim_threshold, 2**31 - 1)  # whose end is not given back,
        libc.mallopt(top_pad, 256 << 20)  # and which grows by 256 MiB at a time


def give_back_freed_memory() -> None:
    """The opposite: glibc returns large blocks at once, whose gaps in its heap would add up where memory is short."""
    if libc := _glibc():
        mmap_threshold = -3
        libc.mallopt(mmap_threshold, 4 << 20)  # a fixed one, which glibc no longer raises


def close_gaps() -> None:
    """Return the free pages between the blocks of glibc's heap, which add up where blocks of many sizes come and go."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> Any:
    import ctypes

    return ctypes.CDLL("libc.so.6") if platform.libc_ver()[0] == "glibc" else None
