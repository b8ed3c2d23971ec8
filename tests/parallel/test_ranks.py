"""What a rank does on a device of its own; where no GPU is, the meta device stands for it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from castalia.parallel.ranks import Ranks


@pytest.fixture
def one_of_two():
    """A group of two ranks of which the other one adds nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def test_the_norm_of_offloaded_gradients_is_on_the_device_of_the_loss(one_of_two):
    ranks = object.__new__(Ranks)  # gradients and parameters on the host, activations and losses on the device
    model = nn.Linear(3, 3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    ranks.stages, ranks.pipeline, ranks.device = {0: model}, None, torch.device("meta")
    assert ranks.gradient_norm().device.type == "meta"
    ranks.device = torch.device("cpu")
    assert ranks.gradient_norm() == 12**0.5
