"""Blocks without attention train in every layout as in one process, and refuse the others by name."""

import numpy as np
import pytest

from castalia.errors import ConfigError
from tests.parallel.test_layouts import LAYOUTS, alone, assert_equal  # noqa: F401 - a fixture
from tests.parallel.test_training import NO_LAYOUT, load_run, losses, run_to_the_end
from tests.parallel.training import train_steps

pytestmark = pytest.mark.xdist_group("pool")
SLOW = pytest.mark.slow
# Gradients of next to nothing become whole steps of Adam, up or down, unless eps is larger than they are.
STEADY = "optimizer.eps=1e-6"


@pytest.mark.parametrize("family", ["gmlp", "mamba", "rwkv"])
@pytest.mark.parametrize("layout", ["zero3", "pp2", pytest.param("zero1", marks=SLOW)])
def test_training_is_that_of_one_process(pool, tiny, alone, family, layout):  # noqa: F811
    world, overrides = LAYOUTS[layout]
    ranks = pool.run(train_steps, world, tiny(family, STEADY, *overrides))
    assert_equal(ranks, alone(family, STEADY), near=1e-5)


MAMBA, RWKV = ["model.mamba={linear_bias: true}"], ["model.num_heads=8", "model.rwkv={width: 48}"]
TENSOR = [
    ("mamba", "tp2", MAMBA),
    ("rwkv", "tp2", RWKV),
    ("mamba", "tp2 sequence", MAMBA),
    ("rwkv", "tp2 sequence", RWKV),
    ("mamba", "tp2 zero3", []),
    ("rwkv", "tp2 zero3", []),
    ("mamba", "tp2 zero1", []),
    ("rwkv", "tp2 zero1", []),
    ("mamba", "tp2 pp2", MAMBA),
    ("rwkv", "tp2 pp2", RWKV),
    ("mamba", "tp2 pp2 dp2 zero3", []),
    ("rwkv", "tp2 pp2 dp2 zero3", []),
    ("mamba", "tp2 sequence", ["train.recompute=full"]),
    ("rwkv", "tp2 sequence", ["model.rwkv_over=batch"]),
    ("mamba", "tp2", ["train.recompute=selective"]),
    ("rwkv", "tp4", []),
    ("mamba", "tp4", MAMBA),
]
MORE = {
    "tp4": (4, ["parallel.tp=4"]),
    "tp2 zero1": (4, ["parallel.tp=2", "parallel.zero=1"]),
    "tp2 zero3": (4, ["parallel.tp=2", "parallel.zero=3"]),
}


@pytest.mark.parametrize(
    ("family", "layout", "overrides"),
    [pytest.param(*case, marks=SLOW if number > 3 else ()) for number, case in enumerate(TENSOR)],
)
def test_tensor_ranks_train_as_one_process(pool, tiny, alone, family, layout, overrides):  # noqa: F811
    """Channels of Mamba, heads and widths of RWKV; of both the scan, too, which all see in fp32."""
    world, own = (LAYOUTS | MORE)[layout]
    ranks = pool.run(train_steps, world, tiny(family, STEADY, *overrides, *own))
    assert_equal(ranks, alone(family, STEADY, *overrides), near_norms=1e-5)


@pytest.mark.parametrize("family", ["mamba", pytest.param("rwkv", marks=SLOW)])
def test_a_run_goes_on_with_another_number_of_tensor_ranks(pool, tiny, tmp_path, family):
    folder, straight = tmp_path / "run", tmp_path / "straight"
    pool.run(run_to_the_end, 1, tiny(family, STEADY, f"checkpoint.dir={straight}"))
    first = [STEADY, "parallel.tp=2", "train.exit_interval=5"]
    pool.run(run_to_the_end, 2, tiny(family, f"checkpoint.dir={folder}", *first))
    second = ["parallel.tp=2", "parallel.zero=3"] if family == "rwkv" else ["parallel.pp=2"]
    world = 4 if family == "rwkv" else 2
    pool.run(run_to_the_end, world, load_run(folder, ["train.exit_interval=null", *NO_LAYOUT, *second]))
    np.testing.assert_allclose(losses(folder), losses(straight), rtol=2e-6)


@SLOW
def test_mambas_scan_computes_in_fp32_on_every_rank(pool, tiny, alone):  # noqa: F811
    """Where the other parameters are cast to bf16 for all ranks."""
    bf16 = "precision.compute=bf16"
    ranks = pool.run(train_steps, 2, tiny("mamba", bf16, "parallel.zero=2"))
    assert_equal(ranks, alone("mamba", bf16), near=2e-3)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("parallel.tp=2", "cannot split gmlp and amlp blocks"),
        ("parallel.cp=2", "gives each rank a part of a sequence, of which they need all"),
        ("train.compile=true", "one graph for blocks of one kind"),
        ("model.mup={}", "has no rates for their matrices"),
        ("data.mask_documents=true", "they mix the tokens of documents"),
    ],
)
def test_what_they_do_not_go_with_is_refused_by_name(tiny, override, said):
    with pytest.raises(ConfigError, match=said):
        tiny("gmlp", override)
