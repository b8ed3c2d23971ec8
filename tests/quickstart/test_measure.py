"""The pace of a machine from two models."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castalia.plan.flops import training_flops
from castalia.quickstart.choose import Pace
from castalia.quickstart.family import model_of
from castalia.quickstart.measure import fitted


@given(st.floats(1e-7, 1e-3), st.floats(1e8, 1e15))
def test_two_models_of_a_machine_tell_what_tokens_and_operations_cost(alone, flops):
    costs = (1e6, 3e7)
    found = fitted([(cost, alone + cost / flops) for cost in costs])
    for cost in (*costs, 1e9):
        assert found.seconds_per_token + cost / found.flops == pytest.approx(alone + cost / flops, rel=1e-3)


def test_a_small_model_that_seems_slower_than_a_large_one_leaves_the_large_one_alone():
    found = fitted([(1e6, 2.0), (1e8, 1.0)])
    assert (found.seconds_per_token, found.flops) == (0.0, 1e8)


def test_larger_models_are_slower():
    pace = Pace(1e-5, 1e10)
    speeds = [pace.tokens_per_second(model_of(layers, width, 2048, 256), 256) for layers, width in ((2, 64), (4, 128))]
    assert speeds[0] > speeds[1]
    model = model_of(2, 64, 2048, 256)
    assert 1 / speeds[0] == pytest.approx(1e-5 + training_flops(model, 256) / 1e10)
