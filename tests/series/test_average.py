from __future__ import annotations

import json

import pytest
import torch

from castalia.checkpoint.opener import open_checkpoint
from castalia.cli.average import command
from castalia.errors import CheckpointError, ConfigError
from castalia.language_model import load_model
from castalia.series.average import averaged, ema_shares, shares_of
from tests.series.changes import exported, steps_of

NAMES = ("blocks.1.mlp.up.weight", "embed.weight", "norm.bias")


def weights(folder, name):
    return open_checkpoint(folder).model[name].read().double()


@pytest.mark.parametrize("to", ["native", "hf"])
def test_the_last_of_a_run_are_averaged(trained, tmp_path, to, capsys):
    run = trained()
    command([str(run)], tmp_path / "mean", to=to, last=3)
    assert "0.3333 of" in capsys.readouterr().out
    steps = steps_of(run)
    for name in NAMES:
        expected = sum(weights(steps[step], name) for step in (18, 19, 20)) / 3
        assert torch.allclose(weights(tmp_path / "mean", name), expected, atol=1e-9)
    origin = json.loads((tmp_path / "mean" / "average.json").read_text())["average_of"]
    assert [source["step"] for source in origin] == [18, 19, 20]
    assert sum(source["share"] for source in origin) == pytest.approx(1.0)
    assert load_model(tmp_path / "mean")(torch.tensor([[1, 2, 3]])).isfinite().all()


def test_an_exponential_average_is_the_running_one(trained, tmp_path, capsys):
    run = trained()
    capsys.readouterr()
    command([str(run)], tmp_path / "ema", steps="16..", ema=0.9, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert [source["step"] for source in told["average_of"]] == [16, 17, 18, 19, 20]
    assert told["path"] == str(tmp_path / "ema") and "average.json" in told["files"]
    steps = steps_of(run)
    running = weights(steps[16], NAMES[0])
    for step in (17, 18, 19, 20):
        running = 0.9 * running + 0.1 * weights(steps[step], NAMES[0])
    assert torch.allclose(weights(tmp_path / "ema", NAMES[0]), running, atol=1e-8)
    assert sum(ema_shares(0.99, 154)) == pytest.approx(1.0)


def test_checkpoints_of_several_runs_and_formats_with_weights(trained, tmp_path):
    one, two = trained(), trained("seed=5")
    folders = exported(two, tmp_path / "hf", "hf", torch.float32, False)
    command([str(one), str(folders / "step20")], tmp_path / "mean", weights="3,1")
    expected = 0.75 * weights(one, NAMES[0]) + 0.25 * weights(two, NAMES[0])
    assert torch.allclose(weights(tmp_path / "mean", NAMES[0]), expected, atol=1e-8)


def test_what_cannot_be_averaged_is_refused(trained, tmp_path):
    one, other = open_checkpoint(trained()), open_checkpoint(trained("model.hidden_size=16", "train.steps=3"))
    with pytest.raises(CheckpointError, match="different models: "):
        averaged([one, other], [0.5, 0.5], None)
    with pytest.raises(ConfigError, match="2 checkpoints need 2 weights"):
        shares_of(2, [1.0], None)
    with pytest.raises(ConfigError, match="exclude each other"):
        shares_of(2, [1.0, 1.0], 0.9)
    with pytest.raises(ConfigError, match="is one checkpoint; an average needs two"):
        command([str(steps_of(trained())[3])], tmp_path / "mean")
