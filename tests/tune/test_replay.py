"""Steps of the runs of `test_watch.py` once more; each replayed loss is the recorded one, bit for bit."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from castalia.cli.main import build
from castalia.cli.replay import _compared
from castalia.cli.train import read_config, train
from castalia.data.config_corpora import open_data
from castalia.errors import TrainingError
from castalia.tune.replay import replay
from tests.observe.test_watch import BAD, poisoned, records, runs  # noqa: F401 - fixtures


def assert_as_recorded(folder, step, begin):
    found, record = replay(folder, step), records(folder)[step]
    assert (found["step"], found["checkpoint"]) == (step, begin)
    for name in ("loss", "grad_norm"):
        assert found[name] == found[f"recorded_{name}"] == record[name]
    assert found["lr"] == record["lr"]
    return found


@pytest.mark.parametrize(
    "policy, step, begin",
    [
        ("report", 4, 0),  # from random weights
        ("report", 11, 10),
        ("report", 24, 20),
        ("skip", BAD, 24),
        ("skip", 29, 25),  # behind the spike
        ("rewind", BAD, 24),  # on the way that was given up
        ("rewind", 27, 25),
    ],
)
def test_a_replayed_step_is_the_recorded_one(runs, policy, step, begin):  # noqa: F811
    assert_as_recorded(runs / policy, step, begin)


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_left_out_steps_between_the_checkpoint_and_the_step_stay_left_out(runs, tmp_path, policy):  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(runs / policy, run)
    for step in ("000025", "000030"):
        shutil.rmtree(run / "checkpoints" / f"step_{step}")
    assert_as_recorded(run, 28, 24)


def test_a_replay_of_dropout_and_fp16_only_reads(straight, poisoned, tmp_path):  # noqa: F811
    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}
    found = assert_as_recorded(straight, 13, 10)
    assert {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()} == before
    assert found["layers"]["activations"].keys() == {"blocks.0", "blocks.1"}
    squares = sum(gradient["norm"] ** 2 for gradient in found["layers"]["gradients"].values())
    assert squares**0.5 == pytest.approx(found["grad_norm"], rel=1e-4)
    fp16 = ["precision.compute=fp16", "precision.loss_scale.initial=1e6", "train.steps=12"]
    train(poisoned(tmp_path / "run", *fp16))
    assert_as_recorded(tmp_path / "run", 12, 10)
    assert records(tmp_path / "run")[12]["skipped"] > 0


def test_sequences_come_with_their_documents_the_worst_first(runs, poisoned):  # noqa: F811
    found = replay(runs / "report", BAD + 1)["sequences"]
    data = open_data(poisoned("unused"))
    losses = [row["loss"] for row in found]
    assert losses == sorted(losses, reverse=True)
    assert sorted(row["position"] for row in found) == sorted(data.positions(BAD).tolist())
    for row in found:
        assert [tuple(piece.values()) for piece in row["pieces"]] == [tuple(p) for p in data.pieces(row["position"])]
        ids = data.sample(row["position"])[0][:16].tolist()
        assert row["text"].encode() == bytes(id for id in ids if id < 256).replace(b"\0", b"")
    mean = sum(row["loss"] * row["tokens"] for row in found) / sum(row["tokens"] for row in found)
    assert mean == pytest.approx(records(runs / "report")[BAD + 1]["loss"], rel=1e-5)


def run_verb(*words):
    return CliRunner().invoke(build("replay"), ["replay", *map(str, words)], catch_exceptions=False).stdout


def test_the_verb_shows_norms_and_sequences(runs):  # noqa: F811
    said = run_verb(runs / "report", "--step", BAD + 2, "--sequences", 3)
    assert f"step {BAD + 2}, from the checkpoint of step 25, steps 26 to 26 computed again" in said
    assert said.count("as recorded, bit for bit") == 2
    assert "blocks.1.mlp.down.weight" in said and "5 more sequences are not shown" in said
    found = json.loads(run_verb(runs / "report", "--step", BAD + 2, "--json"))
    assert found["loss"] == records(runs / "report")[BAD + 2]["loss"] and len(found["sequences"]) == 8


def test_a_step_that_differs_tells_how_far_it_is_from_the_record(runs, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(runs / "report", run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[11] |= {"loss": lines[11]["loss"] * (1 + 2**-20), "grad_norm": None}  # null: it was not finite
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = json.loads(run_verb(run, "--step", 12, "--json"))
    assert found["loss_distance"] == pytest.approx(2**-20, rel=1e-3) and found["grad_norm_distance"] is None
    said = " ".join(run_verb(run, "--step", 12).split())
    assert "is recorded, 9.5e-07 away: another layout, number of threads, machine or version" in said
    assert "bit for bit" not in said
    assert "nothing is recorded of it" in said


def test_gpus_are_named_as_a_reason_unless_the_run_was_deterministic():
    found = {"loss": 2.0, "recorded_loss": 2.1, "loss_distance": 0.05, "repeats_bits": False}
    assert "away: GPUs add in any order without train.deterministic=true" in _compared(found, "loss")
    assert "away: another layout" in _compared(found | {"repeats_bits": True}, "loss")


def test_what_cannot_be_replayed_is_refused(runs, straight, poisoned, tmp_path):  # noqa: F811
    with pytest.raises(TrainingError, match="--step 41: the run's steps are 1 to 40"):
        replay(runs / "report", 41)
    with pytest.raises(TrainingError, match="holds no run: it has no config.yml"):
        run_verb(tmp_path, "--step", 1)
    elsewhere = [f"checkpoint.dir={tmp_path / 'run'}", "checkpoint.step=10", "checkpoint.every=null"]
    shutil.copytree(straight, tmp_path / "trunk")
    train(read_config([str(tmp_path / "trunk"), *elsewhere]))
    assert replay(tmp_path / "run", 12)["loss_distance"] == 0.0  # from the trunk's checkpoint
    shutil.rmtree(tmp_path / "trunk")
    with pytest.raises(TrainingError, match="no checkpoint before step 12, and began with step 11"):
        replay(tmp_path / "run", 12)
