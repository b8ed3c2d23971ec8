"""Joining and leaving the group of processes that torchrun, Slurm or `--nproc` started."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from castalia.errors import ConfigError

TIMEOUT = timedelta(minutes=10)


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
def process_group(device: str) -> Iterator[None]:
    """Joins the other processes, if there are any, and leaves them at the end."""
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    _fill_in_slurm()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={world_size()} says that this is one of several processes, but {', '.join(missing)} "
            "is not set: start them with torchrun, with --nproc, or with a script of `castalia launch`"
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    store, rank, world = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    # A restarted group must not read the addresses that the dead one left in the agent's store.
    store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _fill_in_slurm() -> None:
    """srun starts processes without torchrun's variables, but says the same under other names."""
    for ours, theirs in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"), ("LOCAL_RANK", "SLURM_LOCALID")):
        if theirs in os.environ:
            os.environ.setdefault(ours, os.environ[theirs])


def relaunch(num_processes: int, arguments: Sequence[str]) -> None:
    """Replaces this process by torchrun, which starts `castalia ARGUMENTS` on this machine so many times."""
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    os.execv(sys.executable, [*launcher, "-m", "castalia", *arguments])
