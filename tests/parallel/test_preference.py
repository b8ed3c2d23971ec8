"""Preference tuning on several ranks: losses and gradients are those of one process."""

from __future__ import annotations

import json

import numpy as np
import pytest

from castalia.config.schema import RunConfig
from castalia.data.dataset_writer import DatasetWriter
from castalia.errors import ConfigError
from castalia.parallel.executor import Rows
from castalia.parallel.rank_grid import check_run
from castalia.train.setup import start
from tests.parallel.training import assert_copies_are_equal, train_steps

pytestmark = pytest.mark.xdist_group("pool")

STEPS = 3
LAYOUTS = {
    "dp2": ["parallel.zero=0"],
    "zero1": ["parallel.zero=1"],
    "zero3": ["parallel.zero=3"],
    "tp2": ["parallel.tp=2"],
    "sp2": ["parallel.tp=2", "parallel.sequence_parallel=true"],
}
QUICK = [("dpo", "zero3"), ("dpo", "sp2"), ("kto", "zero3"), ("orpo", "tp2"), ("reward", "tp2")]
FULL = [(objective, layout) for objective in ("dpo", "kto", "orpo", "reward") for layout in LAYOUTS]
CASES = [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in FULL]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, dict]:
    folder, draw = tmp_path_factory.mktemp("pairs"), np.random.default_rng(2)
    texts = [[draw.integers(0, 256, draw.integers(6, 16)) for _ in range(30)] for _ in range(2)]
    for side, items in zip(("pos", "neg"), texts, strict=True):
        with DatasetWriter(folder / side, "int32") as text, DatasetWriter(folder / f"{side}_label", "int32") as labels:
            for item in items:
                text.add(item)
                labels.add(np.where(np.arange(len(item)) < 3, -100, item))
    with DatasetWriter(folder / "rewards", "int32") as rewards:
        for _ in range(30):
            rewards.add([int(draw.choice([-1, 1]))])
    pos, neg = ({"path": f"{folder}/{side}", "labels": f"{folder}/{side}_label"} for side in ("pos", "neg"))
    return {"dpo": {**pos, "rejected": neg}, "kto": {**pos, "rewards": f"{folder}/rewards"}}


@pytest.fixture
def config(tiny, sources):
    def make(objective: str, *overrides: str):
        source = json.dumps([sources["kto" if objective == "kto" else "dpo"]])
        family = "gpt2-tied" if objective == "reward" else "neox-parallel"
        words = [f"train.objective={objective}", f"data.train={source}", "data.packing=unpacked"]
        words += ["train.micro_batch_size=2", "train.accumulation=null", "optimizer.lr=0.01"]
        return tiny(family, *words, *overrides)

    return make


@pytest.mark.parametrize(("objective", "layout"), CASES)
def test_layouts_train_like_one_process(pool, config, objective, layout):
    (alone,) = pool.run(train_steps, 1, config(objective), STEPS)
    ranks = pool.run(train_steps, 2, config(objective, *LAYOUTS[layout]), STEPS)
    assert_copies_are_equal(ranks)
    for seen in ranks:
        assert seen.losses == pytest.approx(alone.losses, rel=1e-4)
        assert seen.norms == pytest.approx(alone.norms, rel=1e-3)
    assert len(set(alone.losses)) == STEPS


def shares_the_mesh(config: RunConfig) -> bool:
    session = start(config)
    assert session.step.preference is not None and session.step.preference.reference is not None
    return session.step.preference.reference.mesh is session.executor.mesh  # type: ignore[attr-defined]


def test_a_reference_model_brings_no_process_groups_of_its_own(pool, config):
    assert pool.run(shares_the_mesh, 2, config("dpo", "parallel.zero=3")) == [True, True]


def first_ratios(config: RunConfig) -> list[float]:
    """Of the first batch, before any step: the policy's log-probabilities less those of the reference model."""
    session = start(config)
    assert session.step.preference is not None and session.step.preference.reference is not None
    rows = Rows.of(session.batch(0))
    with session.executor.evaluating():
        policy = session.executor.each_sequence(rows)
    with session.step.preference.reference.evaluating():
        reference = session.step.preference.reference.each_sequence(rows)
    assert policy.abs().min() > 0
    return (policy - reference).flatten().tolist()


@pytest.mark.parametrize("layout", [[], LAYOUTS["zero3"]], ids=["alone", "zero3"])
@pytest.mark.parametrize("kind", ["pattern=[mamba, attention]", "experts={count: 4, top_k: 2}"])
def test_before_the_first_step_a_model_of_another_kind_is_its_reference_in_bf16(pool, config, layout, kind):
    overrides = ["precision.compute=bf16", f"model.{kind}", "model.init_std=0.3", *layout]
    for ratios in pool.run(first_ratios, 2 if layout else 1, config("dpo", *overrides)):
        assert ratios and set(ratios) == {0.0}


def test_layouts_that_cut_a_sequence_or_the_model_are_refused(config):
    for key in ("pp", "cp"):
        with pytest.raises(ConfigError, match=f"set parallel.{key}=1"):
            check_run(config("dpo", f"parallel.{key}=2"), 2)
