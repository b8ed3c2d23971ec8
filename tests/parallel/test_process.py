"""Joining and leaving the group of processes."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from castalia.parallel.process import _end_job


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
