import json

import pytest
from typer.testing import CliRunner

from castalia.cli.main import build
from castalia.errors import ConfigError, TrainingError

WORDS = ["model.num_layers=1", "model.hidden_size=32", "model.num_heads=2", "model.vocab_size=64"]


def run(*words):
    result = CliRunner().invoke(build("mup"), ["mup", "check", *WORDS, *words], catch_exceptions=False)
    return result.stdout


def test_a_check_prints_slopes_and_draws(tmp_path):
    picture = tmp_path / "mup.png"
    text = run("optimizer.lr=0.002", "--widths", "32,64", "--output", str(picture))
    assert "\nverdict: " in text and "the config has no muP" in text
    assert "muP logits" in text and "standard blocks.0" in text and "grows like" in text
    assert "a muP logits; b standard logits" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(run("--widths", "64,32", "--json"))
    assert found["widths"] == [32, 64]
    assert found["verdict"].keys() == {"carries_over", "words"}
    assert found["slopes"]["muP"].keys() == {"embed", "blocks.0", "logits"}


def test_growth_and_bad_widths_are_errors():
    with pytest.raises(ConfigError, match="--widths 64: give two or more"):
        run("--widths", "64")
    with pytest.raises(ConfigError, match="width 33: heads of 16"):
        run("--widths", "32,33")
    with pytest.raises(TrainingError, match="under muP nothing may grow, .*lower optimizer.lr"):
        run("optimizer.groups=[{match: blocks.0.mlp, lr_scale: 100}]", "optimizer.lr=1", "--widths", "32,64,128")
