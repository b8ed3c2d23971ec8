"""Starting the processes of a run on this machine, and settings that every launcher shares."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from castalia.machine import usable_cores

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

# Time that processes have to save after a signal, before they are killed. torch 2.11 ignores it and waits for 30 s.
SHUTDOWN_TIMEOUT_S = 120
SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"

# Signals that ask a run to save and end. Schedulers announce the end of a job by the last two.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def launch_config(num_processes: int, max_restarts: int, logs: Path | None = None) -> LaunchConfig:
    """Settings of torch's elastic launcher: this machine alone, with time to save after a signal.

    `logs`: a folder for what each rank prints, which is shown as well, each line after its rank.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    os.environ.setdefault(SHUTDOWN_TIMEOUT, str(SHUTDOWN_TIMEOUT_S))
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id="none",  # torchrun's own where no --rdzv-id is given: a name that outlives this launcher is not known
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        signals_to_handle=",".join(stop.name for stop in STOP_SIGNALS),
        role="rank",  # stands before each line that is kept in `logs`
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), tee=Std.ALL) if logs else None,
    )


def relaunch(num_processes: int, arguments: Sequence[str], max_restarts: int = 0, logs: Path | None = None) -> NoReturn:
    """Runs `castalia ARGUMENTS` in `num_processes` processes on this machine, and exits with their exit code."""
    sys.exit(run_processes(num_processes, arguments, max_restarts, logs))


def run_processes(num_processes: int, arguments: Sequence[str], max_restarts: int = 0, logs: Path | None = None) -> int:
    """The exit code of `castalia ARGUMENTS` in `num_processes` processes on this machine.

    When one of them dies all are restarted, at most `max_restarts` times. `logs`: as for `launch_config`.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // num_processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes print their own errors
    config = launch_config(num_processes, max_restarts, logs)
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "castalia", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"error: rank {rank} was killed by signal {-failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as stop:
        return 128 + stop.sigval
    return 0
