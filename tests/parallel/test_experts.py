"""A mixture of experts trains in every layout as in one process."""

import pytest

from tests.parallel.test_layouts import LAYOUTS, alone, assert_equal  # noqa: F401 - a fixture
from tests.parallel.training import train_steps

pytestmark = pytest.mark.xdist_group("pool")
SLOW = pytest.mark.slow
CHOSEN = ["zero3", "tp2", "tp2 sequence", "pp2", "tp2 pp2 dp2 zero1", "cp2"]


@pytest.mark.parametrize("layout", [pytest.param(name, marks=() if name in CHOSEN[:3] else SLOW) for name in CHOSEN])
def test_training_is_that_of_one_process(pool, tiny, alone, layout):  # noqa: F811
    world, overrides = LAYOUTS[layout]
    ranks = pool.run(train_steps, world, tiny("experts", *overrides))
    assert_equal(ranks, alone("experts"))
