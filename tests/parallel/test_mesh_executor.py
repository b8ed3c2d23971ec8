"""What a rank does on a device of its own; where no GPU is, the meta device stands for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from castalia.config.batch import BatchPlan
from castalia.config.schema import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from castalia.data.loader import Batch
from castalia.parallel.executor import RankPart, leading_part, one_process
from castalia.parallel.mesh_executor import MeshExecutor
from castalia.train.optimizer import make_optimizer
from castalia.train.schedule import LearningRate
from castalia.train.step import TrainStep


@pytest.fixture
def one_of_two():
    """A group of two ranks of which the other one adds nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def test_the_norm_of_offloaded_gradients_is_on_the_device_of_the_loss(one_of_two):
    ranks = object.__new__(MeshExecutor)  # gradients and parameters on the host, activations and losses on the device
    model = nn.Linear(3, 3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    ranks.stages, ranks.pipeline, ranks.device = {0: model}, None, torch.device("meta")
    assert ranks.gradient_norm().device.type == "meta"
    ranks.device = torch.device("cpu")
    assert ranks.gradient_norm() == 12**0.5
    assert ranks.gradient_norm({"weight": (1, 2)}) == 6**0.5  # the first two columns alone
    assert ranks.gradient_norm({"weight": (0, 1), "bias": None}) == 6**0.5


def test_the_first_entries_of_a_part():
    part = RankPart(torch.arange(6.0).view(2, 3), (8, 3), (4, 0), True)  # rows 4 and 5
    assert [leading_part(part, (0, size)).numel() for size in (4, 5, 8)] == [0, 3, 6]
    assert leading_part(part, (1, 1)).flatten().tolist() == [0.0, 3.0] and leading_part(part, None) is part.local


@pytest.mark.gpu
@pytest.mark.parametrize("zero", [0, 3])
def test_offloaded_steps_are_those_of_a_gpu_alone(zero, tmp_path):
    """On one GPU, whose group of one rank has both back ends, as that of many."""
    device, plan = torch.device("cuda"), BatchPlan(8, 4, 2)
    model = ModelConfig(num_layers=2, hidden_size=32, num_heads=2, vocab_size=64, max_positions=16)
    config = RunConfig(model=model, data=DataConfig(seq_length=16), parallel=ParallelConfig(zero=zero, offload=True))
    draw, found = np.random.default_rng(0), []
    batches = [Batch(*draw.integers(0, 64, (2, 8, 16)), np.ones((8, 16), bool)) for _ in range(3)]
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    try:
        alone = config.model_copy(update={"parallel": ParallelConfig()})
        for executor in (
            MeshExecutor(config, torch.bfloat16, device, plan),
            one_process(alone, torch.bfloat16, device, plan),
        ):
            executor.initialize(config)
            optimizer = make_optimizer(executor.parameters, OptimizerConfig(lr=0.01))
            rate = LearningRate(0.01, 0.0, 0.0, 100, "constant")
            step = TrainStep(executor, optimizer, rate, plan, seed=1, clip_norm=1.0)
            found.append([step(number, batch)[:2] for number, batch in enumerate(batches)])
        offloaded = next(iter(MeshExecutor(config, torch.bfloat16, device, plan).parameters.values()))
    finally:
        dist.destroy_process_group()
    assert offloaded.device.type == "cpu"
    np.testing.assert_allclose(found[0], found[1], rtol=0.01)
