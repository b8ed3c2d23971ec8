import json
import math
from dataclasses import replace

import pytest

from castalia.config.schema import CheckpointConfig, RunConfig
from castalia.errors import TrainingError
from castalia.train.schedule import LearningRate, is_save_step, learning_rate, resumed_learning_rate


@pytest.fixture(scope="module")
def vectors(fixtures):
    return json.loads((fixtures / "data" / "vectors.json").read_text())


def schedule_of(vector, release=None):
    warmup = vector["warmup"] * vector["iters"]
    return LearningRate(vector["lr"], vector["min_lr"], warmup, vector["iters"], vector["style"], release=release)


def test_exact_rates_are_the_originals(vectors):
    for vector in vectors["lr"]:
        rate = schedule_of(vector, "head")
        assert [rate(k) for k in range(len(vector["values"]))] == pytest.approx(vector["values"], rel=1e-12, abs=1e-18)


def test_corrected_rates_differ_only_where_the_original_is_wrong(vectors):
    spikes = rises = 0
    for vector in vectors["lr"]:
        rate = schedule_of(vector)
        for k, original in enumerate(vector["values"]):
            if original > vector["lr"] * (1 + 1e-12):
                spikes += 1
                assert k == 0
                assert rate(k) == vector["lr"]
            elif vector["style"] == "cosine" and k > vector["iters"]:
                rises += 1
                assert rate(k) == vector["min_lr"] < original
            else:
                assert rate(k) == pytest.approx(original, rel=1e-12, abs=1e-18)
    assert spikes == 1
    assert rises > 0


def test_a_run_that_is_all_warmup_ends_at_the_minimum():
    rate = LearningRate(1.0, 0.1, 10.0, 10, "cosine")
    assert rate(10) == 1.0
    assert rate(11) == pytest.approx(0.1)


def test_warmup_stable_decay_is_flat_and_then_falls_to_the_minimum():
    rate = LearningRate(1.0, 0.1, 10.0, 100, "wsd", cooldown=20.0)
    assert [rate(k) for k in (5, 10, 50, 80)] == [0.5, 1.0, 1.0, 1.0]
    assert [rate(k) for k in (90, 100, 120)] == pytest.approx([0.55, 0.1, 0.1])
    longer = replace(rate, end=200)
    assert [longer(k) for k in range(80)] == [rate(k) for k in range(80)]  # the stable part does not know the end
    assert resumed_learning_rate(rate, rate.stored(), None) == rate
    with pytest.raises(TrainingError, match="end 200 -> 100"):
        resumed_learning_rate(rate, longer.stored(), None)


def test_inverse_square_root_goes_on_from_the_warmup():
    rate = LearningRate(1.0, 0.05, 4.0, 100, "inverse_sqrt")
    assert [rate(k) for k in (2, 4, 16, 64, 10**6)] == [0.5, 1.0, 0.5, 0.25, 0.05]
    assert LearningRate(1.0, 0.0, 0.0, 100, "inverse_sqrt")(4) == 0.5


def test_warmup_may_be_given_in_steps():
    schedule = {"style": "wsd", "warmup_steps": 7, "cooldown": 0.5}
    config = RunConfig.model_validate({"schedule": schedule, "optimizer": {"lr": 1.0}})
    rate = learning_rate(config, 200)
    assert (rate.warmup, rate.cooldown, rate.end) == (7.0, 100.0, 200)
    assert rate(150) == 0.5
    constant = learning_rate(RunConfig.model_validate({"schedule": {"style": "constant", "warmup_steps": 2}}), 10)
    assert [constant(k) / constant.peak for k in (1, 2, 9)] == [0.5, 1.0, 1.0]


def test_resuming_with_another_schedule_must_be_decided():
    old = LearningRate(1e-3, 1e-4, 2.0, 100, "cosine")
    new = LearningRate(1e-3, 1e-4, 4.0, 200, "cosine")
    assert resumed_learning_rate(old, old.stored(), None) == old
    assert resumed_learning_rate(new, old.stored(), "checkpoint") == old
    assert resumed_learning_rate(new, old.stored(), "config") == new
    with pytest.raises(TrainingError, match=r"warmup 2.0 -> 4.0, end 100 -> 200.*schedule_from"):
        resumed_learning_rate(new, old.stored(), None)


def test_save_steps_are_the_originals(vectors):
    for vector in vectors["save_iters"]:
        scale = {"every": vector["factor"]} if vector["scale"] == "linear" else {"log_base": vector["factor"]}
        checkpoint = CheckpointConfig(steps=tuple(vector["extra"] or ()), **scale)
        assert [n for n in range(1, vector["n"] + 1) if is_save_step(checkpoint, n, math.inf)] == vector[
            "saved_in_loop"
        ]


def test_the_pythia_schedule_is_one_line_of_154_checkpoints():
    checkpoint = CheckpointConfig(every=1000, log_base=2, log_until=512, steps=(0,))
    saved = [step for step in range(143_001) if is_save_step(checkpoint, step, 143_000)]
    assert len(saved) == 154
    assert saved[:12] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]


def test_the_last_step_is_always_saved():
    checkpoint = CheckpointConfig(every=10)
    assert is_save_step(checkpoint, 13, 13)
    assert not is_save_step(checkpoint, 13, 14)
