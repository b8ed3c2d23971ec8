"""Hostfiles as DeepSpeed and GPT-NeoX use them: one machine per line, `name slots=8`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from castalia.errors import ConfigError

_LINE = re.compile(r"([^\s#]+)\s+slots\s*=\s*([1-9]\d*)")


class Host(NamedTuple):
    """A machine to start processes on."""

    name: str
    slots: int  # processes, one for each device


def read_hosts(path: str | Path) -> list[Host]:
    """The machines of a hostfile, in its order; `#` begins a comment. Raises ConfigError with file and line."""
    hosts: dict[str, Host] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        text = line.split("#", 1)[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"{path}:{number}: {text!r} is not a host with its slots; write for example: node1 slots=8"
            )
        if match[1] in hosts:
            raise ConfigError(f"{path}:{number}: {match[1]} is listed twice; list each host once, with all its slots")
        hosts[match[1]] = Host(match[1], int(match[2]))
    if not hosts:
        raise ConfigError(f"{path} names no host; write lines such as: node1 slots=8")
    return list(hosts.values())
