"""Joining and leaving the group of processes that torchrun, Slurm or `--nproc` started."""

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

from castalia.errors import CastaliaError, ConfigError
from castalia.parallel.rendezvous import (
    LAST_WORDS_S,
    Place,
    find_place,
    is_main,
    number,
    open_store,
    own_room,
    world_size,
)
from castalia.parallel.watchdog import ENDED, RankLost, Watchdog, operation, operations

MAIN_FIRST_TIMEOUT = timedelta(days=1)  # an index of a large corpus takes its time; a dead process is noticed anyway
WATCHDOG_S = 60.0  # by which NCCL's watchdog, which kills without naming anybody, is more patient than the ranks


@contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block before the others do."""
    if world_size() == 1:
        yield
        return
    group = dist.new_group(backend="gloo", timeout=MAIN_FIRST_TIMEOUT)  # not that of a collective
    if not is_main():
        dist.barrier(group)
    try:
        yield
    finally:
        if is_main():
            dist.barrier(group)


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
    here, store, group = _join(timeout_s)
    job = store.compare_set("job", "", uuid4().hex).decode()
    try:
        if device == "cuda":
            torch.cuda.set_device(local_device(torch.cuda.device_count()))
        with _group_of(here, store, group, device, timeout_s):
            yield job
    except CastaliaError as error:
        _end_job(store, str(error))
    except RuntimeError as error:
        if here.world == 1 or not (isinstance(error, RankLost | dist.DistError) or _GLOO.search(str(error))):
            raise
        _explain_lost_rank(store, group, here, error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _join(timeout_s: float) -> tuple[Place, dist.TCPStore, dist.PrefixStore]:
    """This process's place, the run's store, and the group's room in it. Raises SystemExit where that fails."""
    try:
        here = find_place()
        store = open_store(here, timeout_s)
        if store.check([ENDED]):
            sys.exit(2)  # the launcher started the processes again, but the same error would come
        group = own_room(store, here.rank, here.world, timeout_s)
    except ConfigError as error:  # of this rank alone: it speaks for itself
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    if group is None:
        sys.exit(2)
    return here, store, group


@contextmanager
def _group_of(
    here: Place, store: dist.TCPStore, group: dist.PrefixStore, device: str, timeout_s: float
) -> Iterator[None]:
    """torch's process group, and somebody who looks out while this rank waits in it."""
    if here.world == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    patience = timedelta(seconds=timeout_s + (WATCHDOG_S if device == "cuda" else 0))
    dist.init_process_group(backend, store=group, rank=here.rank, world_size=here.world, timeout=patience)
    with Watchdog(store, group, here.rank, here.world):
        yield


def local_device(visible: int) -> int:
    """Which of the visible GPUs is this process's. Raises ConfigError if its machine has more processes than GPUs.

    Slurm may show each of its tasks other GPUs: of those that it sees a task takes one.
    """
    local, together = number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", 0)
    if together > visible:
        raise ConfigError(
            f"{together} processes were started on this machine, which shows {visible} "
            f"{'GPU' if visible == 1 else 'GPUs'}, and each needs one: start {visible}, or train with "
            "train.device=cpu"
        )
    return local % visible


_GLOO = re.compile(r"gloo|Application timeout caused pair closure")  # most of its errors name its files, one does not


def _end_job(store: dist.Store, message: str) -> NoReturn:
    """Says what is wrong, once for all ranks that find the same, and sees to it that no restart tries again.

    Where no agent of torchrun keeps the store, the first rank does: it stays until the others have had their say.
    """
    said = hashlib.blake2b(message.encode()).hexdigest()
    try:
        store.set(ENDED, "")
        is_first = store.add(said, 1) == 1
    except dist.DistError:  # its keeper is gone already, perhaps without a word
        is_first = True
    if is_first:
        print(f"error: {message}", file=sys.stderr, flush=True)
    if is_main() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        end = time.monotonic() + LAST_WORDS_S
        while store.add(said, 0) < world_size() and time.monotonic() < end:
            time.sleep(0.05)
    sys.exit(2)


def _explain_lost_rank(store: dist.Store, group: dist.Store, here: Place, error: RuntimeError) -> NoReturn:
    """Names the operation in which communication failed and the ranks that do not say the same. Ends the process.

    At once, because to leave a group that has lost a rank may take as long as to wait for it.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # the launcher's, for the same loss: it leaves time for last words
    stack = traceback.extract_tb(error.__traceback__)
    line = f"{operation(stack)} on rank {here.rank}: {str(error).splitlines()[0]}"
    try:
        _tell_lost_rank(store, group, here, line)
    except dist.DistError:  # the store is gone
        print(f"error: rank 0, which kept the run's store, is lost; {line}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def _tell_lost_rank(store: dist.Store, group: dist.Store, here: Place, line: str) -> None:
    group.set(f"lost {here.rank}", "")
    group.set("asked", "")
    end = time.monotonic() + LAST_WORDS_S
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
