"""Scripts that start a run on many machines: torchrun on each of them, meeting at the first one.

The first machine keeps the store that the others join. Where a process dies, all start again from the last checkpoint,
up to `restarts` times. The scripts themselves are the files in `templates/`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from castalia.launch.hosts import Host
from castalia.parallel.launcher import SHUTDOWN_TIMEOUT, SHUTDOWN_TIMEOUT_S
from castalia.units import plural

# Slurm's default signal comes 30 s before it kills the job, too late to finish a step and write a checkpoint.
SIGNAL_BEFORE_END_S = 300


@dataclass(frozen=True)
class LaunchJob:
    """A run to start: what, and on how many machines."""

    name: str
    arguments: Sequence[str]  # of `castalia`: train, configs, overrides
    nodes: int
    gpus: int  # of each node
    layout: str  # in words, for the script's first comment
    hosts: Sequence[Host] = ()
    restarts: int = 3
    port: int = 29500
    obstacles: Sequence[str] = ()  # lines on why the run would not start, for comments below the first

    @property
    def about(self) -> str:
        """The script's first comment."""
        ranks = sum(host.slots for host in self.hosts) or self.nodes * self.gpus
        return f"{plural(ranks, 'rank')} on {plural(self.nodes, 'node')}: {self.layout}"

    def torchrun(self, gpus: int) -> list[str]:
        """The arguments of torchrun that are the same on every node with this many devices."""
        size = ["--nnodes", str(self.nodes), "--nproc-per-node", str(gpus), "--max-restarts", str(self.restarts)]
        return [*size, "--rdzv-backend", "c10d"]

    @property
    def program(self) -> list[str]:
        """What torchrun starts."""
        return ["-m", "castalia", *self.arguments]


def slurm(job: LaunchJob) -> str:
    """A batch script for sbatch."""
    return _render("slurm.sh.j2", job)


def torchrun(job: LaunchJob) -> str:
    """A shell script that starts torchrun here, or, with several hosts, on each of them over ssh."""
    return _render("torchrun.sh.j2", job)


def k8s(job: LaunchJob, image: str) -> str:
    """Kubernetes manifests: a Service that gives pods their names, and an indexed Job with a pod for each node."""
    return _render("k8s.yml.j2", job, image=image, name=kubernetes_name(job.name))


def kubernetes_name(text: str) -> str:
    """A name of at most 40 small letters, digits and dashes, which host names allow."""
    # Stripped twice, because the cut may leave a dash at the end, where none is allowed.
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-") or "castalia"


def _render(template: str, job: LaunchJob, **values: str) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        keep_trailing_newline=True,
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,  # a misspelt name raises instead of leaving a hole
    )
    # For what the user typed: paths and overrides may hold spaces, quotes or dollar signs.
    environment.filters.update(json=json.dumps, word=shlex.quote, words=shlex.join)
    environment.globals.update(
        SHUTDOWN_TIMEOUT=SHUTDOWN_TIMEOUT,  # of torchrun with processes that were told to stop
        SHUTDOWN_TIMEOUT_S=SHUTDOWN_TIMEOUT_S,
        SIGNAL_BEFORE_END_S=SIGNAL_BEFORE_END_S,
    )
    return environment.get_template(template).render(job=job, **values)
