"""Joining and leaving the group of processes that torchrun, Slurm or `--nproc` started."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn
from uuid import uuid4

import torch
import torch.distributed as dist

from castalia.errors import CastaliaError, ConfigError

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

SHUTDOWN_TIMEOUT_S = 120  # what processes have after a signal, to save before they are killed


def world_size() -> int:
    """Processes of this run: 1 unless a launcher says otherwise."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)


def is_main() -> bool:
    """Whether this process speaks for all."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


@contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block before the others do."""
    if world_size() > 1 and not is_main():
        dist.barrier()
    try:
        yield
    finally:
        if world_size() > 1 and is_main():
            dist.barrier()


@contextmanager
def process_group(device: str, timeout_s: float = 600.0) -> Iterator[str | None]:
    """Joins the other processes, if there are any, and leaves them at the end.

    Gives the job's name, which stays the same when torchrun starts the processes again, be it one that is left; None
    for a process of its own.
    An error that users can mend is printed once and ends the job, as does a collective that a rank does not come to.
    """
    if dist.is_initialized() or (world_size() == 1 and "TORCHELASTIC_RUN_ID" not in os.environ):
        yield None
        return
    _fill_in_slurm()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={world_size()} says that this is one of several processes, but {', '.join(missing)} "
            "is not set: start them with torchrun, with --nproc, or with a script of `castalia launch`"
        )
    timeout = timedelta(seconds=timeout_s)
    store, rank, world = next(iter(dist.rendezvous("env://", timeout=timeout)))
    if store.check([_ENDED]):
        sys.exit(2)  # the launcher started the processes again, but the same error would come
    job = store.compare_set("job", "", uuid4().hex).decode()
    group = _fresh(store, rank, world)
    try:
        if device == "cuda":
            torch.cuda.set_device(local_device(os.environ, torch.cuda.device_count()))
        if world > 1:
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, store=group, rank=rank, world_size=world, timeout=timeout)
        yield job
    except CastaliaError as error:
        _end_job(store, str(error))
    except RuntimeError as error:
        if world == 1 or not (isinstance(error, dist.DistError) or _GLOO.search(str(error))):
            raise
        _explain_lost_rank(store, group, error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def local_device(environment: Mapping[str, str], visible: int) -> int:
    """Which of the visible GPUs is this process's. Raises ConfigError if its machine has more processes than GPUs.

    Slurm may show each of its tasks other GPUs: of those that it sees a task takes one.
    """
    local, together = int(environment.get("LOCAL_RANK", 0)), int(environment.get("LOCAL_WORLD_SIZE", 0))
    if together > visible:
        raise ConfigError(
            f"{together} processes were started on this machine, which shows {visible} "
            f"{'GPU' if visible == 1 else 'GPUs'}, and each needs one: start {visible}, or train with "
            "train.device=cpu"
        )
    return local % visible


_ENDED = "ended by an error"
_GLOO = re.compile(r"gloo|Application timeout caused pair closure")  # most of its errors name its files, one does not
_LAST_WORDS_S = 2.0  # how long ranks that lost another one wait for the others to say the same


def _fresh(store: dist.Store, rank: int, world: int) -> dist.PrefixStore:
    """A room in the launcher's store without what a dead group left, such as the addresses of its ranks.

    Every process draws a name. The first rank answers each of the others under the name that it finds in its place,
    which may be that of a dead one, until that rank confirms.
    """
    mine = uuid4().hex
    if rank:
        store.set(f"rank {rank}", mine)
        name = store.get(mine).decode()
        store.set(f"{name} {rank}", "")
        return dist.PrefixStore(name, store)
    for other in range(1, world):
        while not store.check([f"{mine} {other}"]):
            store.set(store.get(f"rank {other}").decode(), mine)
            time.sleep(0.01)
    return dist.PrefixStore(mine, store)


def _end_job(store: dist.Store, message: str) -> NoReturn:
    """Says what is wrong, once for all ranks that find the same, and sees to it that no restart tries again.

    Where no agent of torchrun keeps the store, the first rank does: it stays until the others have had their say.
    """
    said = hashlib.blake2b(message.encode()).hexdigest()
    try:
        store.set(_ENDED, "")
        is_first = store.add(said, 1) == 1
    except dist.DistError:  # its keeper is gone already, perhaps without a word
        is_first = True
    if is_first:
        print(f"error: {message}", file=sys.stderr, flush=True)
    if is_main() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        end = time.monotonic() + _LAST_WORDS_S
        while store.add(said, 0) < world_size() and time.monotonic() < end:
            time.sleep(0.05)
    sys.exit(2)


def _explain_lost_rank(store: dist.Store, group: dist.Store, error: RuntimeError) -> NoReturn:
    """Names the operation in which communication failed and the ranks that do not say the same. Raises SystemExit."""
    rank, world = dist.get_rank(), dist.get_world_size()
    group.set(f"lost {rank}", "")
    end = time.monotonic() + _LAST_WORDS_S
    silent = [other for other in range(world) if not group.check([f"lost {other}"])]
    while len(silent) > 1 and time.monotonic() < end:
        time.sleep(0.05)
        silent = [other for other in range(world) if not group.check([f"lost {other}"])]
    if store.check([_ENDED]):
        sys.exit(2)
    if group.add("told", 1) == 1:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if f"{os.sep}castalia{os.sep}" in frame.filename][-1]
        who = f"rank {', '.join(map(str, silent))} did not come to" if silent else "all ranks gave up waiting in"
        print(
            f"error: {who} {frames[-1].name}, called by {ours.name} "
            f"({os.path.basename(ours.filename)}:{ours.lineno}) on rank {rank}: {str(error).splitlines()[0]}",
            file=sys.stderr,
            flush=True,
        )
    sys.exit(1)


def _fill_in_slurm() -> None:
    """srun starts processes without torchrun's variables, but says the same under other names."""
    for ours, theirs in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"), ("LOCAL_RANK", "SLURM_LOCALID")):
        if theirs in os.environ:
            os.environ.setdefault(ours, os.environ[theirs])


def launch_config(num_processes: int, max_restarts: int) -> LaunchConfig:
    """What torch's launcher is told: this machine alone, and time to save after a signal (torch 2.11 allows 30 s)."""
    from torch.distributed.launcher.api import LaunchConfig

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_TIMEOUT_S))
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
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
