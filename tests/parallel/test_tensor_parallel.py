"""How tensor parallelism splits a real model, against the table of tensors."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from castalia.config.schema import MambaConfig
from castalia.config.tensor_table import tp_dim
from castalia.errors import ConfigError
from castalia.model.transformer import Transformer
from castalia.parallel.tensor_parallel import apply_tensor_parallel
from tests.checkpoint.made import FAMILIES


@pytest.fixture(scope="module")
def two_ranks():
    """A mesh of two tensor ranks; the other one does nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    dist.destroy_process_group()


VARIANTS = {
    "gated, grouped": FAMILIES["llama with biases"].model_copy(update={"num_kv_heads": 2}),
    "learned positions, tied": FAMILIES["gpt2"],
    "scale norm, parallel residual": FAMILIES["gpt_neox"].model_copy(update={"norm": "scalenorm"}),
    "reward model": FAMILIES["llama"].model_copy(update={"reward_head": True}),
    "mamba": FAMILIES["llama"].with_({"pattern": ("mamba", "attention"), "mamba": MambaConfig(linear_bias=True)}),
    "rwkv": FAMILIES["llama"].with_({"pattern": ("rwkv",), "head_dim": None}),
}


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_parameters_are_split_as_the_table_says(two_ranks, cfg) -> None:
    with torch.device("meta"):
        model = Transformer(cfg)
    apply_tensor_parallel(model, two_ranks, sequence_parallel=False)
    splits = {}
    for name, parameter in model.named_parameters():
        (placement,) = parameter.placements if isinstance(parameter, DTensor) else (None,)
        splits[name] = placement.dim if placement is not None and placement.is_shard() else None
    assert splits == {name: tp_dim(name) for name in splits}


def test_a_parameter_that_no_plan_names_is_refused(two_ranks) -> None:
    with torch.device("meta"):
        model = Transformer(FAMILIES["llama"])
        model.blocks["0"].mlp.gain = torch.nn.Parameter(torch.ones(8))
    with pytest.raises(ConfigError, match=r"^blocks\.0\.mlp\.gain cannot be used with parallel\.tp"):
        apply_tensor_parallel(model, two_ranks, sequence_parallel=False)
