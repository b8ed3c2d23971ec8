"""The report and its warnings."""

from __future__ import annotations

import pytest

from castalia.config.load import load_config
from castalia.errors import ConfigError
from castalia.plan.devices import DEVICES
from castalia.plan.run_plan import CorpusFacts, Hardware, RunFacts, default_compute, job_of, layout_of, report, warnings
from castalia.plan.suggest import suggest
from castalia.train.schedule import LearningRate

TINY = ["train.steps=1000", "train.batch_size=8", "train.micro_batch_size=8", "data.seq_length=128"]


def warned(*overrides: str, known: RunFacts | None = None) -> list[str]:
    config = load_config("pythia-14m", [*TINY, *overrides])
    layout, _ = layout_of(config, None)
    return warnings(config, known or RunFacts(), layout)


def test_a_sound_run_earns_no_warning() -> None:
    assert warned() == []


def test_a_schedule_that_ends_before_the_run() -> None:
    (message,) = warned("schedule.decay_steps=600")
    assert "ends at step 600 of 1,000" in message and "last 400 steps train at 0.0001" in message
    assert "schedule.decay_steps=1000" in message


def test_a_schedule_that_ends_after_the_run() -> None:
    rate = LearningRate(peak=0.001, minimum=0.0001, warmup=1430, end=143_000, style="cosine")
    (message,) = warned("schedule.decay_steps=143000", known=RunFacts(rate=rate))
    assert "stops at step 1,000" in message and "0.000699 instead of 0.0001" in message


def test_a_constant_rate_cannot_end_early() -> None:
    assert warned("schedule.decay_steps=600", "schedule.style=constant") == []


def test_a_warm_up_shorter_than_a_step() -> None:
    (message,) = warned("schedule.warmup=0.0001")
    assert "shorter than a step" in message and "schedule.warmup=0.001" in message


def test_gradients_that_are_not_clipped() -> None:
    (message,) = warned("optimizer.clip_norm=null")
    assert "not clipped" in message and "optimizer.clip_norm=1.0" in message


def test_a_disk_that_is_too_small() -> None:
    (message,) = warned(known=RunFacts(kept_checkpoints=1000, free_bytes=2**30))
    assert "157.22 GiB" in message and "1.00 GiB are free" in message
    assert warned(known=RunFacts(kept_checkpoints=1, free_bytes=2**30)) == []


def test_data_seen_too_often_and_a_single_document() -> None:
    few = CorpusFacts("data/few", tokens=10_000, documents=1)
    messages = warned("data.train=[{path: data/few}]", known=RunFacts(corpora=(few,)))
    assert "data/few is seen 102.4 times" in messages[0]
    assert "single document" in messages[1]


def test_epochs_follow_weights_and_the_split() -> None:
    config = load_config("pythia-14m", [*TINY, "data.path=corpus", "data.split='50,30,20'"])
    known = RunFacts(corpora=(CorpusFacts("corpus", tokens=1_024_000, documents=10),))
    assert report(config, known).training.epochs == {"corpus": pytest.approx(2.0)}
    config = load_config("pythia-14m", [*TINY, "data.train=[{path: a, weight: 3}, {path: b}]"])
    known = RunFacts(corpora=(CorpusFacts("a", 768_000, 10, 3.0), CorpusFacts("b", 512_000, 10, 1.0)))
    assert report(config, known).training.epochs == {"a": pytest.approx(1.0), "b": pytest.approx(0.5)}


def test_epochs_of_whole_documents_count_samples_not_padded_places() -> None:
    words = [*TINY, "data.train=[{path: a, labels: l}]", "data.packing=unpacked"]
    config = load_config("pythia-14m", words)
    steps, batch = config.train.steps, report(config, RunFacts()).training.sequences_per_step
    known = RunFacts(corpora=(CorpusFacts("a", tokens=700, documents=100, samples=100.0),))
    assert report(config, known).training.epochs == {"a": pytest.approx(steps * batch / 100)}


def test_epochs_give_the_steps() -> None:
    config = load_config("pythia-14m", [*TINY[1:], "train.epochs=2", "data.train=[{path: a}]"])
    plan = report(config, RunFacts(corpora=(CorpusFacts("a", 1_024_000, 10),)))
    assert plan.training.steps == 2000


def test_the_architecture_alone_is_enough() -> None:
    sizes = ["model.num_layers=12", "model.hidden_size=768", "model.num_heads=12"]
    plan = report(load_config([], sizes), RunFacts())
    assert plan.as_json()["parameters"] == {"total": None, "non_embedding": 85056000}
    assert "vocabulary" in plan.unknown[0] and plan.sized is None
    plan = report(load_config([], [*sizes, "model.vocab_size=50257"]), RunFacts())
    assert plan.sized.total == 162322944
    assert any("micro_batch_size is not given" in line for line in plan.assumed)
    assert any("--gpus" in line for line in plan.unknown)


def test_a_layout_has_one_time_wherever_it_is_told() -> None:
    hardware = Hardware(64, DEVICES["a100-40"], efficiency=0.5)
    config = load_config("pythia-1b")
    best = suggest(job_of(config, hardware, 1024, default_compute(config, hardware)))[0]
    knobs = {"micro_batch_size": best.layout.micro_batch, "accumulation": best.layout.accumulation}
    words = [f"train.{name}={value}" for name, value in knobs.items()] + [f"train.recompute={best.layout.recompute}"]
    words += [f"parallel.{name}={getattr(best.layout, name)}" for name in ("tp", "pp", "zero")]
    words += ["train.batch_size=1024", f"parallel.sequence_parallel={best.layout.sequence_parallel}".lower()]
    plan = report(load_config("pythia-1b", words), RunFacts(), hardware)
    time, training = plan.sized.time, plan.training
    assert time.seconds_per_step == best.costs.total
    assert time.tokens_per_second == pytest.approx(1024 * 2048 / best.costs.total)
    assert time.mfu == pytest.approx(time.tokens_per_second * plan.sized.flops.per_token / (64 * 312e12))
    assert time.seconds == pytest.approx(training.steps * best.costs.total)
    assert time.mfu < 0.5 and plan.sized.memory.fits


def test_the_same_batch_on_any_number_of_devices() -> None:
    for gpus in (8, 96):
        layout, _ = layout_of(load_config("gpt-neox-20b"), gpus)
        assert (layout.gpus, layout.batch) == (gpus, 1536)


@pytest.mark.parametrize(
    ("batch", "whole", "would"),
    [
        (["train.batch_size=100"], 108, "96 or 108 would fit"),
        (["train.batch_size=100", "train.micro_batch_size=4"], 144, "96 or 144 would fit"),
        (["train.batch_size=100", "train.accumulation=2"], 120, "96 or 120 would fit"),
        (["train.batch_size=100", "train.micro_batch_size=4", "train.accumulation=1"], 144, "train.batch_size=48 "),
    ],
)
def test_a_batch_that_does_not_divide_is_planned_with_the_nearest_that_does(batch, whole, would) -> None:
    free = ["train.micro_batch_size=null", "train.accumulation=null"]
    config = load_config("pythia-14m", [*free, *batch], any_batch=True)
    plan = report(config, RunFacts(), Hardware(12, DEVICES["h100"]))
    assert plan.training.sequences_per_step == whole and plan.sized.memory.largest > 0
    assert would in plan.warnings[0] and f"this plan has {whole} sequences" in plan.warnings[0]


def test_what_a_disk_lacks_is_told_in_figures_that_say_something() -> None:
    config = load_config("pythia-14m")
    config = config.model_copy(update={"model": config.model.model_copy(update={"num_layers": 1, "vocab_size": 512})})
    told = report(config, RunFacts(kept_checkpoints=1, free_bytes=3 * 2**20)).warnings
    assert any("checkpoints need 3.8 MiB and 3.0 MiB are free here" in warning for warning in told), told


def test_devices_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"12 devices do not divide into tp 2 x pp 4 x cp 1 = 8; 8 or 16 would"):
        layout_of(load_config("gpt-neox-20b"), 12)


def test_a_config_without_a_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="describes no model"):
        report(load_config([], ["train.steps=5"]), RunFacts())


def test_a_layout_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel.tp=3 does not divide model.num_heads"):
        report(load_config("pythia-14m", ["parallel.tp=3"]), RunFacts())
