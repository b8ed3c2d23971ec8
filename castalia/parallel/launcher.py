"""Starting processes: on this machine, and what every launcher is told."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn
from uuid import uuid4

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

# What processes have after a signal, to save before they are killed. torch 2.11 does not know the variable: 30 s there.
SHUTDOWN_TIMEOUT_S = 120
SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"

# What asks a run to save and end. Schedulers warn by the last two.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def launch_config(num_processes: int, max_restarts: int) -> LaunchConfig:
    """What torch's launcher is told: this machine alone, and time to save after a signal."""
    from torch.distributed.launcher.api import LaunchConfig

    os.environ.setdefault(SHUTDOWN_TIMEOUT, str(SHUTDOWN_TIMEOUT_S))
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        signals_to_handle=",".join(stop.name for stop in STOP_SIGNALS),
    )


def relaunch(num_processes: int, arguments: Sequence[str], max_restarts: int = 0) -> NoReturn:
    """Starts `castalia ARGUMENTS` so many times on this machine, all again when one dies, and exits as they do."""
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes speak for themselves
    config = launch_config(num_processes, max_restarts)
    try:
        elastic_launch(config, sys.executable)("-m", "castalia", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"error: rank {rank} was killed by signal {-failure.exitcode}", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    sys.exit(0)
