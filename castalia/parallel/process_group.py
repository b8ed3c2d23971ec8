"""Joining and leaving the group of processes that torchrun, Slurm or `--nproc` has started."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn
from uuid import uuid4

import torch
import torch.distributed as dist

from castalia.errors import CastaliaError, ConfigError, out_of_memory
from castalia.parallel.rendezvous import (
    REPORT_WAIT_S,
    RankInfo,
    env_int,
    is_main,
    open_store,
    private_store,
    read_rank_info,
    world_size,
)
from castalia.parallel.watchdog import ENDED, RankLost, Watchdog, operation, operations

MAIN_FIRST_TIMEOUT = timedelta(days=1)  # indexing a large corpus takes long; a dead process is noticed anyway
# NCCL's own watchdog kills without naming the lost rank, so it waits this much longer than the ranks do.
WATCHDOG_S = 60.0


@contextmanager
def main_first() -> Iterator[None]:
    """A context manager: rank 0 runs the block before the other ranks do, so that they find its files."""
    if world_size() == 1:
        yield
        return
    group = dist.new_group(backend="gloo", timeout=MAIN_FIRST_TIMEOUT)  # the default group's timeout would be too short
    if not is_main():
        dist.barrier(group)
    interrupted = False
    try:
        yield
    except KeyboardInterrupt:
        interrupted = True  # so are the others, who will not come
        raise
    finally:
        if is_main() and not interrupted:
            dist.barrier(group)


@contextmanager
def process_group(device: str, timeout_s: float = 600.0) -> Iterator[str | None]:
    """A context manager: joins the other processes of the run, if there are any, and leaves them at the end.

    Yields the job's name, which stays the same when torchrun restarts the processes, also when some workers died; None
    outside a distributed job. A CastaliaError inside the block is printed once for all ranks and ends the job with exit
    code 2. A collective that not all ranks come to within `timeout_s` seconds ends it with code 1 and names the lost
    ranks.
    """
    if dist.is_initialized() or (world_size() == 1 and "TORCHELASTIC_RUN_ID" not in os.environ):
        yield None
        return
    here, store, group = _join(timeout_s)
    job = store.compare_set("job", "", uuid4().hex).decode()
    try:
        if device == "cuda":
            torch.cuda.set_device(local_device(torch.cuda.device_count()))
        with _group_of(here, store, group, device, timeout_s):
            yield job
    except CastaliaError as error:
        _end_job(store, str(error))
    except (RuntimeError, MemoryError) as error:
        if message := out_of_memory(error):
            _end_job(store, f"rank {here.rank}: {message}")
        if here.world == 1 or not (isinstance(error, RankLost | dist.DistError) or _GLOO.search(str(error))):
            raise
        _explain_lost_rank(store, group, here, error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _join(timeout_s: float) -> tuple[RankInfo, dist.TCPStore, dist.PrefixStore]:
    """This process's rank, the run's store, and the group's key prefix in it. Raises SystemExit where that fails."""
    try:
        here = read_rank_info()
        store = open_store(here, timeout_s)
        if store.check([ENDED]):
            sys.exit(2)  # the launcher has restarted the processes, but the same error would come again
        group = private_store(store, here.rank, here.world, timeout_s)
    except ConfigError as error:  # only this rank knows of it, so it prints the error itself
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    if group is None:
        sys.exit(2)
    return here, store, group


@contextmanager
def _group_of(
    here: RankInfo, store: dist.TCPStore, group: dist.PrefixStore, device: str, timeout_s: float
) -> Iterator[None]:
    """torch's default process group, with a watchdog while this rank waits in it."""
    if here.world == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    patience = timedelta(seconds=timeout_s + (WATCHDOG_S if device == "cuda" else 0))
    dist.init_process_group(backend, store=group, rank=here.rank, world_size=here.world, timeout=patience)
    with Watchdog(store, group, here.rank, here.world):
        yield


def local_device(visible: int) -> int:
    """The index of this process's GPU among the `visible` ones.

    Slurm may show each task a different set of GPUs, so the index wraps around. Raises ConfigError if this machine has
    more processes than GPUs.
    """
    local, together = env_int("LOCAL_RANK", 0), env_int("LOCAL_WORLD_SIZE", 0)
    if together > visible:
        raise ConfigError(
            f"{together} processes were started on this machine, which shows {visible} "
            f"{'GPU' if visible == 1 else 'GPUs'}, and each needs one: start {visible}, or train with "
            "train.device=cpu"
        )
    return local % visible


# How gloo's errors are told from other RuntimeErrors: most name one of its source files, one does not.
_GLOO = re.compile(r"gloo|Application timeout caused pair closure")


def _end_job(store: dist.Store, message: str) -> NoReturn:
    """Prints the error once for all ranks that meet it, and marks the job so that restarted processes exit at once.

    Rank 0, which hosts the store unless torchrun's agent does, waits until the other ranks have reported.
    """
    said = hashlib.blake2b(message.encode()).hexdigest()
    try:
        store.set(ENDED, "")
        is_first = store.add(said, 1) == 1
    except dist.DistError:  # the store's host has ended already, perhaps without printing anything
        is_first = True
    if is_first:
        print(f"error: {message}", file=sys.stderr, flush=True)
    if is_main() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        end = time.monotonic() + REPORT_WAIT_S
        while store.add(said, 0) < world_size() and time.monotonic() < end:
            time.sleep(0.05)
    sys.exit(2)


def _reason(error: Exception) -> str:
    """The first line of an error; of gloo's its first sentence, without the source file before it and advice after."""
    line = str(error).splitlines()[0]
    return re.sub(r"^\[\S+\] *", "", line).partition(". ")[0] if _GLOO.search(line) else line


def _explain_lost_rank(store: dist.Store, group: dist.Store, here: RankInfo, error: Exception) -> NoReturn:
    """Prints the operation in which communication failed and the ranks that did not reach it, and ends the process.

    It ends without cleaning up, because leaving a group that has lost a rank may take as long as waiting for that rank.
    """
    if threading.current_thread() is threading.main_thread():
        # The launcher sends SIGTERM for the same loss; ignoring it leaves time to report.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stack = traceback.extract_tb(error.__traceback__)
    line = f"{operation(stack)} on rank {here.rank}: {_reason(error)}"
    try:
        _report_lost_ranks(store, group, here, line)
    except dist.DistError:  # the store is gone
        print(f"error: rank 0, which kept the run's store, is lost; {line}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def _report_lost_ranks(store: dist.Store, group: dist.Store, here: RankInfo, line: str) -> None:
    """Finds the ranks that did not fail alike and where they are; the first rank to have done so prints it."""
    group.set(f"lost {here.rank}", "")
    group.set("asked", "")
    end = time.monotonic() + REPORT_WAIT_S
    silent = list(range(here.world))
    while time.monotonic() < end and (len(silent) > 1 or not all(group.check([f"at {rank}"]) for rank in silent)):
        time.sleep(0.05)
        silent = [other for other in silent if not group.check([f"lost {other}"])]
    if store.check([ENDED]):
        os._exit(2)
    if group.add("told", 1) == 1:
        who = f"rank {', '.join(map(str, silent))} did not come to" if silent else "all ranks gave up waiting in"
        where = f" ({operations(group, silent)})" if silent else ""
        print(f"error: {who} {line}{where}", file=sys.stderr, flush=True)
