"""Joining and leaving the group: launchers of every torch, devices, and errors that end in one line."""

from __future__ import annotations

import os
from dataclasses import fields

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import Std

from castalia.cli.train import command as train
from castalia.errors import ConfigError
from castalia.parallel.launcher import SHUTDOWN_TIMEOUT_S, launch_config
from castalia.parallel.process_group import _end_job, _reason, local_device


def test_launchers_of_every_torch_take_what_they_are_told(monkeypatch):
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    config = launch_config(3, 2)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (1, 1, 3, 2)
    if "shutdown_timeout" in {field.name for field in fields(config)}:  # since torch 2.13
        assert config.shutdown_timeout == SHUTDOWN_TIMEOUT_S


def test_what_each_rank_prints_is_kept_if_asked(tmp_path):
    logs = launch_config(2, 0, tmp_path / "logs").logs_specs
    assert logs.root_log_dir == f"{tmp_path}/logs" and logs._tee == Std.ALL
    with pytest.raises(ConfigError, match="--log-dir is for the processes that --nproc starts"):
        train(["pythia-14m"], log_dir=tmp_path)


def test_a_lost_connection_is_told_without_the_librarys_advice():
    lost = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:26546: Connection reset "
    advice = "by peer. This is typically caused by a remote worker hanging. Check the logs."
    assert _reason(RuntimeError(lost + advice)) == "Read error [127.0.0.1]:26546: Connection reset by peer"
    assert _reason(RuntimeError("NCCL error. More.\nMuch more.")) == "NCCL error. More."


@pytest.mark.parametrize(
    ("environment", "visible", "device"),
    [
        ({}, 8, 0),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, 4, 3),
        ({"LOCAL_RANK": "3", "SLURM_LOCALID": "3"}, 1, 0),  # srun --gpus-per-task=1
        ({"LOCAL_RANK": "5"}, 8, 5),
    ],
)
def test_each_process_takes_a_gpu_that_it_sees(monkeypatch, environment, visible, device):
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert local_device(visible) == device


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="4 processes were started on this machine, which shows 2 GPUs.* start 2"):
        local_device(2)


def test_an_error_is_told_though_the_rank_that_kept_the_store_is_gone(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    keeper = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    store = dist.TCPStore("localhost", keeper.port, is_master=False)
    del keeper
    with pytest.raises(SystemExit) as end:
        _end_job(store, "no data")
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: no data\n"


def test_the_rank_that_keeps_the_store_waits_for_the_others_to_say_the_same(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    keeper = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            _end_job(keeper, "no data")
    assert capsys.readouterr().err == "error: no data\n"
