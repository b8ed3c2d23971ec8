"""Memory of this machine: how much is free, and how users write an amount of it."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

from castalia.errors import ConfigError

SHARE = 0.8  # of the free memory, for a model that is streamed because it does not fit
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
# The limit of this process's control group, in versions 2 and 1 of their interface.
GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


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
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _group_limit(file: str) -> int | None:
    try:
        return int(Path(file).read_text())
    except (OSError, ValueError):  # no such group, or the word "max"
        return None


def parse_memory(text: str, option: str = "--memory") -> int:
    """Bytes of `4GB`, `1.5 GiB` or `800M`. Raises ConfigError, with the option's name, for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    if not match or not (number := int(float(match[1]) * UNITS[match[2] or ""])):
        raise ConfigError(f"{option} {text}: write an amount such as 4GB, 1.5GiB or 800MB")
    return number
