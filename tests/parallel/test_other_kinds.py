"""Blocks without attention train in every layout as in one process, and refuse the others by name."""

import pytest

from castalia.errors import ConfigError
from tests.parallel.test_layouts import LAYOUTS, alone, assert_equal  # noqa: F401 - a fixture
from tests.parallel.training import train_steps

pytestmark = pytest.mark.xdist_group("pool")
SLOW = pytest.mark.slow


@pytest.mark.parametrize("family", ["gmlp", "mamba", "rwkv"])
@pytest.mark.parametrize("layout", ["zero3", "pp2", pytest.param("zero1", marks=SLOW)])
def test_training_is_that_of_one_process(pool, tiny, alone, family, layout):  # noqa: F811
    world, overrides = LAYOUTS[layout]
    ranks = pool.run(train_steps, world, tiny(family, *overrides))
    assert_equal(ranks, alone(family), near=1e-5)


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
