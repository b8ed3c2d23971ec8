"""Machines to start on, from a hostfile as DeepSpeed's and GPT-NeoX's users have it: `name slots=8`, one a line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from castalia.errors import ConfigError

_LINE = re.compile(r"([^\s#]+)\s+slots\s*=\s*([1-9]\d*)")


class Host(NamedTuple):
    name: str
    slots: int  # processes, one for each device


def read_hosts(path: str | Path) -> list[Host]:
    """Empty lines and those that begin with # do not count. Raises ConfigError naming file and line."""
    hosts: dict[str, Host] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        text = line.split("#", 1)[0].strip()
        if not text:
            continue
        found = _LINE.fullmatch(text)
        if found is None:
            raise ConfigError(
                f"{path}:{number}: {text!r} is not a host with its slots; write for example: node1 slots=8"
            )
        if found[1] in hosts:
            raise ConfigError(f"{path}:{number}: {found[1]} is there twice; give each host once, with all its slots")
        hosts[found[1]] = Host(found[1], int(found[2]))
    if not hosts:
        raise ConfigError(f"{path} names no host; write lines such as: node1 slots=8")
    return list(hosts.values())
