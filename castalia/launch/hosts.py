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


def chosen_hosts(hostfile: Path | None, nodes: int | None, gpus_per_node: int | None) -> list[Host]:
    """The first `nodes` of the hostfile, with `gpus_per_node` slots where that is given. Empty without a file.

    Raises ConfigError for more machines or slots than the file has.
    """
    if hostfile is None:
        return []
    hosts = read_hosts(hostfile)
    if nodes and nodes > len(hosts):
        raise ConfigError(f"--nodes {nodes} is more than the {len(hosts)} hosts of {hostfile}")
    small = [host for host in hosts[:nodes] if host.slots < (gpus_per_node or 1)]
    if small:
        raise ConfigError(
            f"{hostfile}: {small[0].name} has {small[0].slots} slots, not --gpus-per-node {gpus_per_node}"
        )
    return [host._replace(slots=gpus_per_node or host.slots) for host in hosts[:nodes]]
