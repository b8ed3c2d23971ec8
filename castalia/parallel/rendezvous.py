"""How the processes of a run find each other: the launcher's variables, the store of the run, and a key prefix in it.

Whatever fails here ends in a ConfigError within the time allowed. Until then a process can be interrupted.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from threading import Thread
from typing import NamedTuple, TypeVar
from uuid import uuid4

import torch.distributed as dist

from castalia.errors import ConfigError

T = TypeVar("T")
REPORT_WAIT_S = 2.0  # how long a rank waits for others to report the same, so that one of them prints it


class RankInfo(NamedTuple):
    """A process's rank among those of its run, and the address of the store through which they meet."""

    rank: int
    world: int
    host: str
    port: int
    hosts_store: bool  # whether this process hosts the store; an agent of torchrun may do so instead


def env_int(name: str, default: int, least: int = 0) -> int:
    """A whole number from a launcher's environment variable. Raises ConfigError if it is none or below `least`."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(
            f"{name}={text} is not a whole number of at least {least}; a launcher (torchrun, srun, --nproc) sets it: "
            "use one, or unset it"
        )
    return int(text)


def world_size() -> int:
    """How many processes the run has: 1 unless a launcher says otherwise.

    A Slurm allocation without `srun` starts one process, so the size of the allocation does not count.
    """
    return env_int("WORLD_SIZE", env_int("SLURM_STEP_NUM_TASKS", 1, least=1), least=1)


def is_main() -> bool:
    """Whether this process prints and writes for all: rank 0."""
    return env_int("RANK", env_int("SLURM_PROCID", 0)) == 0


def read_rank_info() -> RankInfo:
    """This process's rank and the store's address, from torchrun's or Slurm's variables.

    Raises ConfigError where variables are missing or contradict each other.
    """
    _fill_in_slurm()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={world_size()} says that this is one of several processes, but {', '.join(missing)} "
            "is not set: start them with torchrun, with --nproc, or with a script of `castalia launch`"
        )
    rank, world, port = env_int("RANK", 0), world_size(), env_int("MASTER_PORT", 0, least=1)
    if rank >= world:
        raise ConfigError(f"RANK={rank} is not one of the ranks 0 to {world - 1} of WORLD_SIZE={world}")
    if port > 65535:
        raise ConfigError(f"MASTER_PORT={port} is not a port: the highest is 65535")
    hosts_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return RankInfo(rank, world, os.environ["MASTER_ADDR"], port, hosts_store)


def open_store(here: RankInfo, timeout_s: float) -> dist.TCPStore:
    """Connects to the store of the run, which rank 0 hosts unless torchrun's agent does.

    Raises ConfigError where nothing, or something else, listens at the address within `timeout_s` seconds.
    """
    end = time.monotonic() + timeout_s
    if here.hosts_store:
        try:
            socket.create_server(("", here.port)).close()  # a port that is taken is reported as such
        except OSError as error:
            raise ConfigError(
                f"rank 0 cannot listen at port {here.port} of its machine: {os.strerror(error.errno or 0)}; set "
                "MASTER_PORT to one that is free, on all ranks"
            ) from error
    else:
        _find_listener(here, end, timeout_s)
    host = "127.0.0.1" if here.hosts_store else here.host  # its own store needs no MASTER_ADDR

    def connect() -> dist.TCPStore:
        timeout = timedelta(seconds=timeout_s)
        return dist.TCPStore(
            host, here.port, here.world, here.hosts_store, timeout, wait_for_workers=False, multi_tenant=True
        )

    store = _within(max(1.0, end - time.monotonic()), connect)
    if store is None:
        raise ConfigError(
            f"what listens at {here.host}:{here.port} is not rank 0 of this run; set MASTER_PORT to a port that is "
            "free there, on all ranks"
        )
    return store


def private_store(store: dist.Store, rank: int, world: int, timeout_s: float) -> dist.PrefixStore | None:
    """A fresh key prefix in the launcher's store, so that keys of a crashed process group are not seen.

    A store that outlives its processes still holds, for example, the addresses of dead ranks. So every process draws a
    random name, and ranks above 0 publish theirs under `rank R`. Rank 0 writes its own name, the prefix, under each
    name that it finds there, which may be a dead process's, until that rank confirms; once all ranks have, it
    declares the prefix open.

        rank R                                   rank 0
        set "rank R" = name_R            ->      get "rank R"
        wait for name_R                  <-      set name_R = name_0
        set "name_0 R"                   ->      rank R has joined
        wait for "name_0 is open"        <-      set "name_0 is open" = yes or no

    Returns None on ranks above 0 where some rank did not come; rank 0 raises a ConfigError that names those ranks.
    """
    own_name, end = uuid4().hex, time.monotonic() + timeout_s
    if rank:
        try:
            store.set(f"rank {rank}", own_name)
            name = _await(store, own_name, end)
            store.set(f"{name} {rank}", "")
            is_open = _await(store, f"{name} is open", end) == "yes"
        except dist.DistError as error:
            raise ConfigError(f"rank 0, which keeps the run's store, was lost before rank {rank} had joined") from error
        except TimeoutError as error:
            raise ConfigError(f"rank 0 did not answer rank {rank} within {timeout_s:g} s") from error
        return dist.PrefixStore(name, store) if is_open else None
    waiting = set(range(1, world))
    while waiting and time.monotonic() < end:
        for other in sorted(waiting):
            if store.check([f"{own_name} {other}"]):
                waiting.remove(other)
            elif store.check([f"rank {other}"]):  # by this rank, or by a dead process that had its number
                store.set(store.get(f"rank {other}").decode(), own_name)
        time.sleep(0.01)
    store.set(f"{own_name} is open", "no" if waiting else "yes")
    if waiting:
        time.sleep(REPORT_WAIT_S)  # the others read the answer from a store that may end with this process
        who = f"rank {', '.join(map(str, sorted(waiting)))}"
        raise ConfigError(f"{who} of {world} did not come within {timeout_s:g} s; look for its own error, or start it")
    return dist.PrefixStore(own_name, store)


def _await(store: dist.Store, key: str, end: float) -> str:
    """Polls until a key exists and returns its value. Raises TimeoutError after `end`, by time.monotonic."""
    while not store.check([key]):
        if time.monotonic() > end + 2 * REPORT_WAIT_S:  # rank 0 reports before this rank does
            raise TimeoutError
        time.sleep(0.02)
    return store.get(key).decode()


def _find_listener(here: RankInfo, end: float, timeout_s: float) -> None:
    """Waits until something listens at the store's address: DNS may learn names late, and rank 0 may start last."""
    while True:
        try:
            socket.create_connection((here.host, here.port), timeout=2.0).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ConfigError(
                    f"rank {here.rank} found no rank 0 at {here.host}:{here.port} within {timeout_s:g} s "
                    f"({error.strerror or error}): it did not start, or MASTER_ADDR and MASTER_PORT name another place"
                ) from error
        time.sleep(0.1)


def _within(seconds: float, make: Callable[[], T]) -> T | None:
    """What `make` returns, or None if it does not return in time: another program's port may never answer."""
    made: list[T] = []
    raised: list[Exception] = []

    def work() -> None:
        try:
            made.append(make())
        except RuntimeError as error:  # raised again by the thread that waits
            raised.append(error)

    # A daemon thread, because a connection that never answers cannot be interrupted.
    thread = Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise ConfigError(f"the run's store cannot be reached: {str(raised[0]).splitlines()[0]}") from raised[0]
    return made[0] if made else None


def _fill_in_slurm() -> None:
    """Sets torchrun's variables from Slurm's, which say the same under other names."""
    names = (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"), ("LOCAL_RANK", "SLURM_LOCALID"))
    for name, slurm_name in names if "SLURM_STEP_NUM_TASKS" in os.environ else ():
        if slurm_name in os.environ:
            os.environ.setdefault(name, os.environ[slurm_name])
