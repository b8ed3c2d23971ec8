"""A mixture of experts trains in every layout as in one process."""

import pytest

from tests.parallel.test_layouts import LAYOUTS, alone, assert_equal  # noqa: F401 - a fixture
from tests.parallel.training import train_steps

pytestmark = pytest.mark.xdist_group("pool")
SLOW = pytest.mark.slow
CHOSEN = ["zero3", "tp2", "tp2 sequence", "pp2", "tp2 pp2 dp2 zero1", "cp2"]
QUICK = [("experts", "zero3"), ("experts", "tp2"), ("balanced", "tp2 sequence"), ("balanced", "zero3")]


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param(family, layout, marks=() if (family, layout) in QUICK else SLOW)
        for family in ("experts", "balanced")
        for layout in CHOSEN
    ],
)
def test_training_is_that_of_one_process(pool, tiny, alone, family, layout):  # noqa: F811
    world, overrides = LAYOUTS[layout]
    ranks = pool.run(train_steps, world, tiny(family, *overrides))
    assert_equal(ranks, alone(family))
