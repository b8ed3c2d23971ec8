"""A mixture of experts trains in every layout as in one process."""

import numpy as np
import pytest

from tests.parallel.test_layouts import LAYOUTS, alone, assert_equal  # noqa: F401 - a fixture
from tests.parallel.test_training import NO_LAYOUT, load_run, losses, run_to_the_end
from tests.parallel.training import train_steps

pytestmark = pytest.mark.xdist_group("pool")
SLOW = pytest.mark.slow
CHOSEN = ["zero3", "tp2", "tp2 sequence", "pp2", "tp2 pp2 dp2 zero1", "cp2"]
EXPERT = {
    "expert2": (2, ["parallel.expert=2"]),
    "expert2 of 4, zero1": (4, ["parallel.expert=2", "parallel.zero=1"]),
    "expert2 of 4, zero3": (4, ["parallel.expert=2", "parallel.zero=3", "train.recompute=full"]),
    "expert4 of 8, hsdp": (
        8,
        ["parallel.expert=4", "parallel.zero=2", "parallel.dp_replicate=2", "train.accumulation=2"],
    ),
    "expert2 of 4, replicas": (4, ["parallel.expert=2", "optimizer.clip_norm=0.1"]),
    "expert2 pp2": (4, ["parallel.expert=2", "parallel.pp=2"]),
    "expert2 pp2 interleaved": (4, ["parallel.expert=2", "parallel.pp=2", "parallel.pipeline=interleaved"]),
    "expert2 cp2": (2, ["parallel.expert=2", "parallel.cp=2"]),
    "expert4 cp2 zero1": (4, ["parallel.expert=4", "parallel.cp=2", "parallel.zero=1"]),
}
QUICK_EXPERT = ["expert2 of 4, zero3", "expert2 pp2"]
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


@pytest.mark.parametrize("layout", [pytest.param(name, marks=() if name in QUICK_EXPERT else SLOW) for name in EXPERT])
def test_ranks_that_share_out_the_experts_train_as_one_process(pool, tiny, alone, layout):  # noqa: F811
    world, overrides = EXPERT[layout]
    ranks = pool.run(train_steps, world, tiny("balanced", *overrides))
    assert_equal(ranks, alone("balanced", *(other for other in overrides if other.startswith("optimizer"))))


@pytest.mark.parametrize(
    "before, first, after, second",
    [
        (2, ["parallel.expert=2", "parallel.zero=1"], 2, ["parallel.tp=2"]),
        pytest.param(2, ["parallel.tp=2"], 4, ["parallel.expert=4", "parallel.zero=3"], marks=SLOW),
        pytest.param(4, ["parallel.expert=2", "parallel.zero=3"], 1, [], marks=SLOW),
    ],
)
def test_a_run_goes_on_with_experts_shared_out_otherwise(pool, tiny, tmp_path, before, first, after, second):
    folder, straight = tmp_path / "run", tmp_path / "straight"
    pool.run(run_to_the_end, 1, tiny("balanced", f"checkpoint.dir={straight}"))
    pool.run(run_to_the_end, before, tiny("balanced", f"checkpoint.dir={folder}", "train.exit_interval=5", *first))
    pool.run(run_to_the_end, after, load_run(folder, ["train.exit_interval=null", *NO_LAYOUT, *second]))
    np.testing.assert_allclose(losses(folder), losses(straight), rtol=2e-6)


def test_in_bf16_losses_stay_close_and_the_biases_are_moved_alike(pool, tiny, alone):  # noqa: F811
    half = ["precision.compute=bf16"]
    ranks = pool.run(train_steps, 2, tiny("balanced", "parallel.expert=2", "parallel.zero=3", *half), 3)
    one = alone("balanced", *half, steps=3)
    np.testing.assert_allclose(ranks[0].losses, one.losses, rtol=2e-3)


def test_gradients_of_experts_are_divided_by_tensor_ranks_only_as_the_original_does(pool, tiny):
    def norm(world, *overrides):
        """Of the experts' gradients in the first step; nothing else trains."""
        only = ['finetune.train=["mlp.experts"]', "model.init=seeded"]
        return pool.run(train_steps, world, tiny("experts", *only, *overrides), 1)[0].norms[0]

    assert norm(2, "parallel.tp=2") == pytest.approx(norm(1), rel=1e-5)
    exact = "neox_exact=true"
    assert norm(2, "parallel.tp=2", exact) == pytest.approx(norm(1, exact) / 2, rel=1e-5)
