"""The batch of a step: what is given is kept, what is left out is inferred, what cannot be is told."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.config.batch import batch_plan
from castalia.config.load import load_config
from castalia.config.schema import ParallelConfig, RunConfig, TrainConfig
from castalia.errors import ConfigError


def plan(dp: int = 1, gpus: int | None = None, **train: int):
    return tuple(batch_plan(RunConfig(train=TrainConfig(**train), parallel=ParallelConfig(gpus=gpus)), dp))


@pytest.mark.parametrize(
    ("given", "dp", "expected"),
    [
        ({"batch_size": 32, "micro_batch_size": 4, "accumulation": 2}, 4, (32, 4, 2)),
        ({"batch_size": 32, "micro_batch_size": 4}, 1, (32, 4, 8)),
        ({"batch_size": 32, "accumulation": 2}, 4, (32, 4, 2)),
        ({"batch_size": 32}, 4, (32, 8, 1)),
        ({"micro_batch_size": 4, "accumulation": 2}, 3, (24, 4, 2)),
        ({"micro_batch_size": 4}, 2, (8, 4, 1)),
    ],
)
def test_what_is_missing_is_inferred(given, dp, expected):
    assert plan(dp, **given) == expected


def test_declared_devices_fix_the_batch_and_other_ranks_change_the_accumulation():
    assert plan(1, gpus=2, micro_batch_size=4, accumulation=1) == (8, 4, 2)
    assert plan(2, gpus=2, micro_batch_size=4, accumulation=1) == (8, 4, 1)
    assert plan(2, gpus=8, batch_size=64, micro_batch_size=4, accumulation=2) == (64, 4, 8)


@pytest.mark.parametrize(
    ("overrides", "dp", "message"),
    [
        (["train.batch_size=48", "train.micro_batch_size=4", "train.accumulation=3"], 2, "= 24; "),
        (["train.batch_size=48", "train.micro_batch_size=4", "train.accumulation=3"], 2, "train.accumulation=6"),
        (["train.batch_size=30", "train.micro_batch_size=4"], 1, "28 or 32 would fit"),
        (["train.batch_size=30"], 4, "28 or 32 would fit"),
        (["train.accumulation=3"], 1, "the batch is unknown; give train.batch_size"),
    ],
)
def test_a_batch_that_does_not_come_out_is_refused_with_what_would(overrides, dp, message):
    with pytest.raises(ConfigError) as error:
        batch_plan(load_config([], overrides), dp)
    assert message in str(error.value)
    assert str(error.value).startswith("command line: ")


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64), st.sets(st.integers(0, 2), max_size=2))
@settings(max_examples=100)
def test_any_two_of_the_three_give_the_third(micro, accumulation, dp, left_out):
    """With the batch size given, or the other two, nothing is lost by leaving the rest out."""
    given = {"batch_size": micro * accumulation * dp, "micro_batch_size": micro, "accumulation": accumulation}
    kept = {name: value for n, (name, value) in enumerate(given.items()) if n not in left_out}
    if len(kept) >= 2:
        assert plan(dp, **kept) == tuple(given.values())
    elif "batch_size" in kept:
        total, micro_batch, steps = plan(dp, **kept)
        assert total == given["batch_size"] == micro_batch * steps * dp
