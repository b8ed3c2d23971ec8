"""How layers change over a run's checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from torch import Tensor

from castalia.cli.diff import command
from castalia.errors import CheckpointError, ConfigError
from castalia.examine.layer_changes import layer_history
from tests.checkpoint.made import FAMILIES, made, written
from tests.examine.test_diff import mapped

STEPS = {0: 1.0, 10: 1.5, 20: -1.0}  # what the weights of block 1 are multiplied by


def scaled(factor: float):
    def change(name: str, weight: Tensor) -> Tensor:
        return weight * factor if name.startswith("blocks.1.") else weight

    return change


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("run")
    for step, factor in STEPS.items():
        written(mapped(made(FAMILIES["gpt_neox"]), scaled(factor)), folder / f"step_{step:06}", "native")
    return str(folder)


def test_norm_change_and_angle_of_each_layer_since_the_first_checkpoint(run):
    found = layer_history(run)
    assert found.steps == (0, 10, 20)
    first, grown, turned = found.layers["blocks.1"]
    weights = [ref.read().double() for name, ref in made(FAMILIES["gpt_neox"]).model.items() if "blocks.1." in name]
    size = math.sqrt(sum(float(weight.square().sum()) for weight in weights))
    assert (first.norm, grown.norm) == (pytest.approx(size), pytest.approx(1.5 * size))
    assert (first.relative, grown.relative, turned.relative) == (0.0, pytest.approx(0.5), pytest.approx(2.0))
    assert (grown.cosine, turned.cosine) == (pytest.approx(1.0), pytest.approx(-1.0))
    assert all(change.relative == 0.0 for change in found.layers["blocks.0"])


def test_the_verb_shows_the_last_and_writes_all(run, tmp_path: Path, capsys):
    command(run, all_steps=True, plot=tmp_path / "layers.png")
    said = capsys.readouterr().out
    assert "layers at step 20 beside step 0 (3 checkpoints)" in said and "2.0000" in said
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    command(run, all_steps=True, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == [0, 10, 20] and found["layers"]["blocks.1"][1]["relative"] == pytest.approx(0.5)


def test_what_cannot_be_compared_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="takes one run and no steps"):
        command(run, run, all_steps=True)
    with pytest.raises(ConfigError, match="name two checkpoints"):
        command(run)
    one = tmp_path / "one"
    written(made(FAMILIES["gpt_neox"]), one / "step_000000", "native")
    with pytest.raises(CheckpointError, match="holds 1 checkpoints; changes of layers need two"):
        layer_history(str(one))
