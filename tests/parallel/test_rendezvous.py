"""Processes that cannot meet say so in one line, within the time allowed."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from castalia.errors import ConfigError
from castalia.parallel.rendezvous import RankInfo, is_main, open_store, private_store, read_rank_info, world_size

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
SLURM = ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
MEET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def variables(monkeypatch):
    """A function that sets the launcher's variables to these alone."""

    def only(given):
        for name in (*VARIABLES, *SLURM):
            monkeypatch.setenv(name, "")  # which is taken for unset, and put back afterwards whoever sets it
            monkeypatch.delenv(name)
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    return only


@pytest.fixture
def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(
    ("given", "world", "main"),
    [
        ({}, 1, True),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 1, True),  # inside sbatch or salloc, but not under srun
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, 4, False),
        ({"WORLD_SIZE": "2", "RANK": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 2, True),
    ],
)
def test_how_many_processes_there_are(variables, given, world, main):
    variables(given)
    assert (world_size(), is_main()) == (world, main)


def test_tasks_of_srun_know_their_place(variables):
    variables(MEET | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"})
    assert read_rank_info() == RankInfo(3, 4, "127.0.0.1", 29500, hosts_store=False)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT is not set"),
        (MEET | {"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 is not one of the ranks 0 to 1"),
        (MEET | {"WORLD_SIZE": "2", "RANK": "x"}, "RANK=x is not a whole number"),
        (MEET | {"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE=two is not a whole number"),
        (MEET | {"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE=0 is not a whole number of at least 1"),
        (MEET | {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a port"),
    ],
)
def test_variables_that_make_no_sense_are_refused(variables, given, reason):
    variables(given)
    with pytest.raises(ConfigError, match=reason):
        read_rank_info()


def test_ranks_that_do_not_come_are_named_and_the_others_leave(free_port):
    places = [RankInfo(rank, 4, "127.0.0.1", free_port, hosts_store=rank == 0) for rank in (0, 2)]
    with ThreadPoolExecutor(2) as ranks:
        stores = list(ranks.map(lambda here: open_store(here, 5.0), places))
        first, other = (
            ranks.submit(private_store, store, here.rank, 4, 1.0) for store, here in zip(stores, places, strict=True)
        )
        with pytest.raises(ConfigError, match="rank 1, 3 of 4 did not come within 1 s"):
            first.result()
        assert other.result() is None


def test_ranks_that_come_share_a_room(free_port):
    places = [RankInfo(rank, 3, "127.0.0.1", free_port, hosts_store=rank == 0) for rank in range(3)]
    with ThreadPoolExecutor(3) as ranks:
        rooms = list(ranks.map(lambda here: private_store(open_store(here, 9.0), here.rank, 3, 9.0), places))
    rooms[1].set("key", "value")
    assert rooms[2].get("key") == b"value"


def test_a_rank_says_that_rank_0_is_nowhere(free_port):
    with pytest.raises(ConfigError, match=f"rank 1 found no rank 0 at 127.0.0.1:{free_port} within 0.1 s"):
        open_store(RankInfo(1, 2, "127.0.0.1", free_port, hosts_store=False), 0.1)
    with pytest.raises(ConfigError, match=r"rank 1 found no rank 0 at no-such-host\.invalid"):
        open_store(RankInfo(1, 2, "no-such-host.invalid", free_port, hosts_store=False), 0.1)


def test_rank_0_keeps_its_store_whatever_address_the_others_were_told(free_port, capfd):
    store = open_store(RankInfo(0, 2, "no-such-host.invalid", free_port, hosts_store=True), 5.0)
    with pytest.raises(ConfigError, match="rank 1 of 2 did not come within 0.1 s; look for its own error"):
        private_store(store, 0, 2, 0.1)
    assert capfd.readouterr().err == ""


def test_a_port_of_another_program_is_told(free_port):
    with socket.create_server(("", free_port)):
        with pytest.raises(ConfigError, match=f"rank 0 cannot listen at port {free_port} of its machine: Address alr"):
            open_store(RankInfo(0, 2, "127.0.0.1", free_port, hosts_store=True), 1.0)
        with pytest.raises(ConfigError, match=f"what listens at 127.0.0.1:{free_port} is not rank 0"):
            open_store(RankInfo(1, 2, "127.0.0.1", free_port, hosts_store=False), 0.1)


def test_rank_0_may_be_lost_while_others_join():
    keeper = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = dist.TCPStore("127.0.0.1", keeper.port, is_master=False)
    del keeper
    with pytest.raises(ConfigError, match="rank 0, which keeps the run's store, was lost before rank 1"):
        private_store(store, 1, 2, 5.0)
