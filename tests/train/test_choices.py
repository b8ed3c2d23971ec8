"""Whole runs with other optimizers, schedules and parametrizations than the usual ones."""

import json

import pytest

from castalia.errors import CheckpointError
from castalia.train.loop import train

CHOICES = {
    "muon": ["optimizer.name=muon", "train.z_loss=1e-4", "schedule.style=wsd", "schedule.warmup_steps=2"],
    "lion": ["optimizer.name=lion", "optimizer.lr=0.001", "optimizer.groups=[{match: embed, lr_scale: 0.5}]"],
    "sgd": ["optimizer.name=sgd", "optimizer.momentum=0.9", "optimizer.lr=0.1", "model.mup.base_width=16"],
    "adafactor": ["optimizer.name=adafactor", "schedule.style=inverse_sqrt"],
}


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CHOICES)
def test_a_stopped_and_resumed_run_is_the_straight_one(tiny, tmp_path, name):
    words = [*CHOICES[name], "train.steps=8", "eval.every=null", "checkpoint.every=null"]
    straight = losses(train(tiny(tmp_path / "straight", *words)))
    folder = train(tiny(tmp_path / "run", *words, "train.exit_interval=4"))
    train(tiny(folder, *words, f"checkpoint.resume={folder}"))
    assert losses(folder) == straight
    assert straight[-1] < straight[0]
    with pytest.raises(CheckpointError, match="that of another optimizer.*checkpoint.load_optimizer=false"):
        train(tiny(folder, *words, "optimizer.name=adamw", f"checkpoint.resume={folder}"))
