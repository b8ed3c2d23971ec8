"""Where processes meet: what their launcher's variables say, the store that one of them keeps, and a room in it.

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
LAST_WORDS_S = 2.0  # how long a rank waits for others to say the same, so that one speaks for all


class Place(NamedTuple):
    """A process's place among those of its run, and where they meet."""

    rank: int
    world: int
    host: str
    port: int
    keeps: bool  # whether this process keeps the store; an agent of torchrun may do so instead


def number(name: str, default: int, least: int = 0) -> int:
    """A launcher's variable."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(
            f"{name}={text} is no whole number of at least {least}; a launcher (torchrun, srun, --nproc) sets it: "
            "use one, or unset it"
        )
    return int(text)


def world_size() -> int:
    """Processes of this run: 1 unless a launcher says otherwise. A Slurm allocation alone, without srun, starts one."""
    return number("WORLD_SIZE", number("SLURM_STEP_NUM_TASKS", 1, least=1), least=1)


def is_main() -> bool:
    """Whether this process speaks for all."""
    return number("RANK", number("SLURM_PROCID", 0)) == 0


def find_place() -> Place:
    """What the launcher's variables say. Raises ConfigError where they say too little, or the impossible."""
    _fill_in_slurm()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={world_size()} says that this is one of several processes, but {', '.join(missing)} "
            "is not set: start them with torchrun, with --nproc, or with a script of `castalia launch`"
        )
    rank, world, port = number("RANK", 0), world_size(), number("MASTER_PORT", 0, least=1)
    if rank >= world:
        raise ConfigError(f"RANK={rank} is none of the ranks 0 to {world - 1} that WORLD_SIZE={world} counts")
    if port > 65535:
        raise ConfigError(f"MASTER_PORT={port} is no port: they go up to 65535")
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return Place(rank, world, os.environ["MASTER_ADDR"], port, keeps)


def open_store(here: Place, timeout_s: float) -> dist.TCPStore:
    """The store of the run, which rank 0 makes unless torchrun's agent did."""
    end = time.monotonic() + timeout_s
    if here.keeps:
        try:
            socket.create_server(("", here.port)).close()
        except OSError as error:
            raise ConfigError(
                f"rank 0 cannot listen at port {here.port} of its machine: {os.strerror(error.errno or 0)}; set "
                "MASTER_PORT to one that is free, on all ranks"
            ) from error
    else:
        _find_listener(here, end, timeout_s)

    def connect() -> dist.TCPStore:
        timeout = timedelta(seconds=timeout_s)
        return dist.TCPStore(
            here.host, here.port, here.world, here.keeps, timeout, wait_for_workers=False, multi_tenant=True
        )

    store = _within(max(1.0, end - time.monotonic()), connect)
    if store is None:
        raise ConfigError(
            f"what listens at {here.host}:{here.port} is not rank 0 of this run; set MASTER_PORT to a port that is "
            "free there, on all ranks"
        )
    return store


def own_room(store: dist.Store, rank: int, world: int, timeout_s: float) -> dist.PrefixStore | None:
    """A room in the launcher's store without what a dead group left, such as the addresses of its ranks.

    Every process draws a name. The first rank answers each of the others under the name that it finds in its place,
    which may be that of a dead one, until that rank confirms; when all have, it opens the room.
    None: the first rank has said who did not come. Raises ConfigError, on the first rank, where somebody did not.
    """
    mine, end = uuid4().hex, time.monotonic() + timeout_s
    if rank:
        try:
            store.set(f"rank {rank}", mine)
            name = _await(store, mine, end)
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
            if store.check([f"{mine} {other}"]):
                waiting.remove(other)
            elif store.check([f"rank {other}"]):
                store.set(store.get(f"rank {other}").decode(), mine)
        time.sleep(0.01)
    store.set(f"{mine} is open", "no" if waiting else "yes")
    if waiting:
        time.sleep(LAST_WORDS_S)  # the others read it, from this process perhaps
        who = f"rank {', '.join(map(str, sorted(waiting)))}"
        raise ConfigError(f"{who} of {world} did not come within {timeout_s:g} s; look for its own error, or start it")
    return dist.PrefixStore(mine, store)


def _await(store: dist.Store, key: str, end: float) -> str:
    """The value of a key as soon as it is there."""
    while not store.check([key]):
        if time.monotonic() > end + 2 * LAST_WORDS_S:  # the first rank is to speak before this one
            raise TimeoutError
        time.sleep(0.02)
    return store.get(key).decode()


def _find_listener(here: Place, end: float, timeout_s: float) -> None:
    """Until somebody listens where rank 0 should. Names may become known late, and rank 0 may start last."""
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

    thread = Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise ConfigError(f"the run's store cannot be reached: {str(raised[0]).splitlines()[0]}") from raised[0]
    return made[0] if made else None


def _fill_in_slurm() -> None:
    """srun starts processes without torchrun's variables, but says the same under other names."""
    names = (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"), ("LOCAL_RANK", "SLURM_LOCALID"))
    for ours, theirs in names if "SLURM_STEP_NUM_TASKS" in os.environ else ():
        if theirs in os.environ:
            os.environ.setdefault(ours, os.environ[theirs])
