"""A run of 40 steps whose 25th batch is garbage, under each policy; step 25 counts from 1."""

import json
import random
import shutil
from statistics import median

import numpy as np
import pytest
import torch

from castalia.checkpoint.opener import open_checkpoint
from castalia.cli.train import read_config, train
from castalia.config.load import load_config
from castalia.config.schema import WatchConfig
from castalia.data.config_corpora import open_data
from castalia.errors import ConfigError, TrainingError
from castalia.observe.metrics import read_events, read_metrics
from castalia.observe.watch import PaceChange, Spikes, StepPace, first_bad_activation
from castalia.tune.replay import replay
from tests.train.conftest import MODEL

BAD = 25
OPTIONS = ["train.steps=40", "watch.window=16", "eval.batches=0", "checkpoint.every=10", "checkpoint.steps=[24,25]"]


@pytest.fixture(scope="session")
def poisoned(tiny, corpus, tmp_path_factory):
    """A function: folder and overrides -> config over a corpus with garbage where step 25 reads."""
    prefix = tmp_path_factory.mktemp("poisoned") / "words"
    for ending in (".bin", ".idx"):
        shutil.copyfile(f"{corpus}{ending}", f"{prefix}{ending}")

    def config(folder, *overrides):
        # Not by a hash, which garbage would change, and with it what step 25 reads.
        return tiny(folder, *OPTIONS, f"data.path={prefix}", "data.holdout=contiguous", *overrides)

    data = open_data(config("unused"))
    tokens, starts = np.memmap(f"{prefix}.bin", np.uint16, "r+"), np.cumsum([0, *data.corpora[0].text.sizes])
    draw = random.Random(1)
    for position in data.positions(BAD - 1):
        for _, document, start, stop in data.pieces(int(position)):
            tokens[starts[document] + start : starts[document] + stop] = draw.choices(range(128, 256), k=stop - start)
    tokens.flush()
    return config


def records(folder):
    return {record["step"]: record for record in read_metrics(folder)}


def losses(folder):
    return {step: (record["loss"], record["grad_norm"], record["lr"]) for step, record in records(folder).items()}


def spikes(folder):
    return [event for event in read_events(folder) if event["event"] == "spike"]


def weights(folder, step):
    model = open_checkpoint(folder / "checkpoints" / f"step_{step:06d}").model
    return {name: reference.read() for name, reference in model.items()}


def assert_equal_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture(scope="module")
def runs(poisoned, tmp_path_factory):
    """The folders of a run under each policy that goes on."""
    folder = tmp_path_factory.mktemp("runs")
    for policy in ("report", "skip", "rewind"):
        train(poisoned(folder / policy, f"watch.policy={policy}"))
    return folder


def test_a_spike_is_reported_with_all_that_explains_it(runs, poisoned, tmp_path):
    (spike,) = spikes(runs / "report")
    assert (spike["step"], spike["action"]) == (BAD, "report") and "loss" in spike["what"]
    record, before = records(runs / "report")[BAD], [records(runs / "report")[step]["loss"] for step in range(9, BAD)]
    assert (spike["loss"], spike["grad_norm"]) == (record["loss"], record["grad_norm"])
    assert spike["usual"]["loss"] == median(before)
    data = open_data(poisoned("unused"))
    assert spike["samples"] == data.positions(BAD - 1).tolist()
    assert spike["pieces"] == [[*piece] for position in spike["samples"] for piece in data.pieces(position)]
    assert len(spike["texts"]) == len(spike["pieces"]) and all("\ufffd" in text for text in spike["texts"])
    squares = sum(gradient["norm"] ** 2 for gradient in spike["gradients"].values())
    assert squares**0.5 == pytest.approx(record["grad_norm"], rel=1e-4)
    assert spike["weights"].keys() == weights(runs / "report", 10).keys()
    train(poisoned(tmp_path / "blind", "watch.threshold=1e9"))
    assert losses(tmp_path / "blind") == losses(runs / "report")  # looking changes nothing
    assert not spikes(tmp_path / "blind")


def test_skipping_leaves_out_one_update(runs):
    assert [spike["action"] for spike in spikes(runs / "skip")] == ["skip"]
    assert_equal_weights(weights(runs / "skip", BAD - 1), weights(runs / "skip", BAD))
    assert list(losses(runs / "skip")) == list(range(1, 41))
    after = records(runs / "skip")[BAD + 1]
    assert after["skipped"] == 1
    assert after["lr"] == records(runs / "report")[BAD]["lr"]  # the schedule counts updates
    assert median(record["loss"] for step, record in records(runs / "skip").items() if step > BAD) < 3


def test_stopping_saves_what_was_before_and_can_go_on(runs, poisoned, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=rf"step {BAD} is a spike.*castalia replay .* --step {BAD}"):
        train(poisoned(run, "watch.policy=stop", "checkpoint.steps=[]"))
    assert max(losses(run)) == BAD - 1
    assert_equal_weights(weights(run, BAD - 1), weights(runs / "skip", BAD - 1))
    with pytest.raises(TrainingError, match=f"step {BAD} is a spike"):
        train(read_config([str(run)]))
    train(read_config([str(run), "watch.policy=skip"]))
    assert losses(run) == losses(runs / "skip")
    assert_equal_weights(weights(run, 40), weights(runs / "skip", 40))


def test_rewinding_leaves_out_everything_since_the_checkpoint(runs, poisoned, tmp_path):
    run = runs / "rewind"
    (rewind,) = [event for event in read_events(run) if event["event"] == "rewind"]
    assert (rewind["step"], rewind["back_to"]) == (BAD, BAD - 1)
    further = tmp_path / "further"
    train(poisoned(further, "watch.policy=rewind", "watch.back=2"))
    assert_equal_weights(weights(further, 20), weights(further, BAD))
    progress = open_checkpoint(further / "checkpoints" / f"step_{BAD:06d}").progress
    assert (progress.step, progress.skipped, progress.tokens) == (BAD, 5, BAD * 8 * 16)
    assert losses(further)[BAD] == losses(runs / "report")[BAD]  # what happened stays on record
    assert records(further)[BAD + 1]["lr"] == records(further)[21]["lr"]
    assert records(further)[40]["skipped"] == 5
    assert records(further)[40]["loss"] < 3


@pytest.mark.parametrize("policy", ["skip", "rewind"])
@pytest.mark.parametrize("step", [20, 30])
def test_resuming_before_or_after_a_spike_is_bit_equal(runs, tmp_path, policy, step):
    run = tmp_path / "run"
    shutil.copytree(runs / policy, run)
    train(read_config([str(run), f"checkpoint.step={step}"]))
    assert losses(run) == losses(runs / policy)
    assert_equal_weights(weights(run, 40), weights(runs / policy, 40))
    again, straight = (open_checkpoint(folder).progress for folder in (run, runs / policy))
    assert again == straight


def test_rewinding_takes_adapters_back(runs, poisoned, tmp_path):
    run = tmp_path / "run"
    adapters = [f"checkpoint.init_from={runs / 'skip'}", "finetune.lora.rank=4", "watch.policy=rewind"]
    train(poisoned(run, *adapters))
    assert [event["back_to"] for event in read_events(run) if event["event"] == "rewind"] == [BAD - 1]
    assert_equal_weights(weights(run, BAD - 1), weights(run, BAD))
    found = replay(run, BAD + 3)
    assert found["loss"] == records(run)[BAD + 3]["loss"]


def test_rewinding_again_and_again_ends_the_run(poisoned, tmp_path):
    with pytest.raises(TrainingError, match="going back to step 40 did not help 3 times"):
        train(poisoned(tmp_path / "run", "watch.policy=rewind", "watch.threshold=1e-3", "train.steps=60"))


def test_there_must_be_a_checkpoint_to_go_back_to(poisoned, tmp_path):
    nothing = ["checkpoint.every=null", "checkpoint.steps=[]"]
    with pytest.raises(TrainingError, match="no checkpoint of this run.*checkpoint.every"):
        train(poisoned(tmp_path / "run", "watch.policy=rewind", *nothing))


def test_overflows_are_written_down(poisoned, tmp_path):
    fp16 = ["precision.compute=fp16", "precision.loss_scale.initial=1e12", "train.steps=2", "watch.policy=stop"]
    train(poisoned(tmp_path / "run", *fp16))
    (overflow, *_) = [event for event in read_events(tmp_path / "run") if event["event"] == "overflow"]
    assert (overflow["step"], overflow["loss_scale"], overflow["grad_norm"]) == (1, 1e12, None)
    assert len(overflow["samples"]) == 8 and overflow["gradients"]


def test_a_loss_that_is_not_finite_can_be_skipped(poisoned, tmp_path):
    with pytest.raises(TrainingError, match="50 steps in a row"):  # the weights are lost: no skipping helps
        train(poisoned(tmp_path / "run", "optimizer.lr=1e30", "optimizer.clip_norm=null", "watch.policy=skip",
                       "train.steps=60", "checkpoint.steps=[]"))  # fmt: skip
    first = spikes(tmp_path / "run")[0]
    assert (first["loss"] is None) or (first["grad_norm"] is None)


def test_units_that_die_are_counted(poisoned, tmp_path):
    train(poisoned(tmp_path / "run", "model.activation=relu", "watch.dead_every=5", "optimizer.lr=1", "train.steps=15"))
    found = [event for event in read_events(tmp_path / "run") if event["event"] == "dead units"]
    assert found and all(event["step"] % 5 == 0 for event in found)
    assert 0 < found[0]["units"]["blocks.0.mlp.up.weight"] <= 128


def test_spikes_are_upward_and_far_from_the_median():
    draw = random.Random(1)
    watch = Spikes(WatchConfig(window=20))
    for step in range(60):
        loss, norm = 3 - step / 100 + draw.gauss(0, 0.02), draw.lognormvariate(0, 0.2)
        assert watch.look(loss, norm) is None
        watch.remember(loss, norm)
    assert watch.look(5.0, 1.0).what == ("loss",)
    assert watch.look(2.4, 50.0).what == ("grad_norm",)
    assert watch.look(0.1, 0.001) is None
    assert watch.look(float("nan"), 1.0).what == ("loss",)
    again = Spikes(WatchConfig(window=20), json.loads(json.dumps(watch.stored())))
    assert again.look(5.0, 50.0) == watch.look(5.0, 50.0)
    assert Spikes(WatchConfig(window=20)).look(5.0, 50.0) is None  # it does not know yet what is usual


def test_looking_for_a_bad_activation_leaves_no_hooks_after_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(RuntimeError), first_bad_activation([model], lambda tensor: True):
        model(torch.ones(1, 3))
    assert not any(module._forward_hooks for module in model.modules())


def changes(seconds):
    pace = StepPace(20)
    return [(step, told) for step, value in enumerate(seconds) if (told := pace.look(value))]


def test_a_change_of_pace_is_told_once_and_so_is_its_end():
    found = changes(2.0 if step == 15 or 30 <= step < 37 or step >= 60 else 1.0 for step in range(80))
    assert [(step, told.slow) for step, told in found] == [(32, True), (39, False), (62, True)]
    assert [told for _, told in changes([1.0] * 5 + [3.0] * 3 + [1.0, 0.8])] == [PaceChange(True, 3.0, 1.0)]


def test_a_pace_about_the_threshold_is_told_of_once():
    assert len(changes([1.0] * 20 + [1.6, 1.6, 1.6, 1.4, 1.4] * 4)) == 1


def test_a_jump_of_the_loss_in_the_first_steps_is_a_spike():
    watch = Spikes(WatchConfig())
    losses = [6.1, 6.0, 5.9, 6.0, 5.8]
    assert [watch.look(loss, 1.0) for loss in losses if watch.remember(loss, 1.0) is None] == [None] * 5
    assert watch.look(10.7, 40.0).what == ("loss",)
    assert watch.look(7.9, 40.0) is None


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["watch.policy=rewind", "checkpoint.save_optimizer=false"], "watch.policy=rewind goes back to checkpoints"),
        (["watch.policy=rewind", "watch.back=3", "checkpoint.keep_last=2"], "watch.back=3 .*keep 3"),
        (["watch.window=3"], "watch.window: 3"),
        (["watch.policy=ignore"], "watch.policy: 'ignore'"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config([], [*MODEL, *overrides])
