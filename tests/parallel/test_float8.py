"""Training in float8 in every layout, close to one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from castalia.errors import ConfigError
from castalia.parallel.compile import compile_blocks
from tests.checkpoint.made import made, written
from tests.parallel.test_adapters import MODELS
from tests.parallel.training import assert_copies_are_equal, train_steps

pytestmark = pytest.mark.xdist_group("pool")

FLOAT8 = "precision.compute=fp8"
LAYOUTS = {
    "zero3": (2, ["parallel.zero=3"]),
    "tp2": (2, ["parallel.tp=2"]),
    "tp2 sequence": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "pp2": (2, ["parallel.pp=2"]),
    "pp2 zero-bubble": (2, ["parallel.pp=2", "parallel.pipeline=zero-bubble"]),
    "cp2": (2, ["parallel.cp=2"]),
    "recomputed": (2, ["parallel.zero=1", "train.recompute=selective"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_trains_close_to_one_process(pool, tiny, name):
    world, layout = LAYOUTS[name]
    ranks = pool.run(train_steps, world, tiny("neox-parallel", FLOAT8, *layout), 4)
    (one,) = pool.run(train_steps, 1, tiny("neox-parallel", FLOAT8), 4)
    (plain,) = pool.run(train_steps, 1, tiny("neox-parallel", "precision.compute=bf16"), 4)
    assert one.losses != plain.losses
    np.testing.assert_allclose(ranks[0].losses, one.losses, rtol=1e-3)
    np.testing.assert_allclose(ranks[0].norms, one.norms, rtol=2e-2)
    assert_copies_are_equal(ranks)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("bases") / "llama"
    written(made(MODELS["llama"], optimizer=False), folder, "native")
    return folder


@pytest.mark.parametrize("layout", [[], ["parallel.tp=2"]], ids=["one process", "tp2"])
def test_adapters_beside_float8(pool, tiny, base, layout):
    lora = ["finetune.lora.rank=4", "optimizer.lr=0.01", f"checkpoint.init_from={base}"]
    ranks = pool.run(train_steps, 2 if layout else 1, tiny("llama", FLOAT8, *lora, *layout), 3)
    (plain,) = pool.run(train_steps, 1, tiny("llama", "precision.compute=bf16", *lora), 3)
    assert ranks[0].losses != plain.losses
    np.testing.assert_allclose(ranks[0].losses, plain.losses, rtol=5e-3)


def test_compiling_for_a_cpu_is_refused(tiny):
    config = tiny("neox-parallel", FLOAT8, "train.compile=true")
    with pytest.raises(ConfigError, match="does not build with precision.compute=fp8"):
        compile_blocks(nn.Module(), config, torch.device("cpu"))
