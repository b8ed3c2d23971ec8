"""Whether a model is streamed follows from the memory of the device that it is computed on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from castalia.checkpoint.restore import architecture
from castalia.config.schema import ModelConfig, ParallelConfig
from castalia.errors import ConfigError
from castalia.parallel.rank_grid import layout
from castalia.plan.stream_plan import SHARE, answers_work, least_budget, memory_without_streaming, plan_stream
from castalia.serve.loaded_models import Library
from castalia.streaming import open_streamed
from castalia.streaming.open_streamed import budget_for
from castalia.streaming.stream_units import units_of
from castalia.units import parse_size
from tests.checkpoint.made import FAMILIES, made

MODEL = ModelConfig(num_layers=8, hidden_size=1024, num_heads=8, vocab_size=1000)


def test_processes_share_the_memory_of_a_machine_and_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    work = answers_work(MODEL, 128, 1, 4)
    free = memory_without_streaming(MODEL, work, 4)  # two processes with half the model each need less
    monkeypatch.setattr(open_streamed, "free_memory", lambda: free)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")

    def same_on_all(every: list[Any], own: Any) -> None:
        every[:] = [own] * len(every)

    monkeypatch.setattr(dist, "all_gather_object", same_on_all)
    grid = layout(ParallelConfig(tp=2), 2)
    assert budget_for(MODEL, work, 4, None, torch.device("cuda"), grid) is None
    assert budget_for(MODEL, work, 4, None, torch.device("cpu"), grid) == int(SHARE * (free // 2))
    assert budget_for(MODEL, work, 4, 123, torch.device("cuda"), grid) == 123


def test_a_server_takes_a_share_of_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**10))
    monkeypatch.setattr(open_streamed, "free_memory", lambda: 10**8)
    for device, free in (("cuda", 10**9), ("cpu", 10**8)):
        library = Library(None, device)
        library.close()
        assert library.memory == int(SHARE * free)


def test_keys_and_values_on_disk_are_refused_for_a_gpu() -> None:
    checkpoint = made(FAMILIES["llama"], optimizer=False)
    model = architecture(checkpoint)
    units, work = units_of(checkpoint, model, torch.float32), answers_work(model, 8, 1, 4)
    least = least_budget(units.sizes(), work)
    plan = plan_stream(units.sizes(), work, least)
    assert plan.cache_on_disk
    with pytest.raises(ConfigError, match="the GPU has no room for the keys and values") as refusal:
        open_streamed.open_streamed(checkpoint, model, units, plan, device=torch.device("cuda"))
    wanted = parse_size(str(refusal.value).rpartition(" ")[2], "--memory")
    assert wanted >= least + work.cache_each and not plan_stream(units.sizes(), work, wanted).cache_on_disk
