"""Checkpoints on several processes: how `generate` and `eval` start them."""

from __future__ import annotations

import sys


def start_processes(tp: int, pp: int, nproc: int | None) -> int:
    """The number of processes. Starts them in place of this one, if it is the first and there is to be more than one.

    As many as the layout takes, unless `nproc` or a launcher says otherwise.
    """
    from castalia.config.schema import ParallelConfig
    from castalia.parallel.launcher import relaunch
    from castalia.parallel.rank_grid import layout
    from castalia.parallel.rendezvous import world_size

    started = world_size()
    wanted = started if started > 1 else nproc or tp * pp
    layout(ParallelConfig(tp=tp, pp=pp), wanted)  # raises where so many ranks cannot be divided like this
    if wanted > started:
        relaunch(wanted, sys.argv[1:])
    return wanted
