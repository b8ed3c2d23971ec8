"""The commented config says the same as the settings it was made of, and what the user asked for instead."""

import pytest

from castalia.config.commented import commented, load, overridden
from castalia.config.load import load_config
from castalia.errors import ConfigError
from castalia.quickstart.choose import Pace, choose
from castalia.quickstart.config_text import Places, settings


@pytest.fixture
def values():
    chosen = choose(10**6, Pace(1e-5, 1e10), 4 << 30, seconds=300)
    return settings(chosen, Places("runs/a", "runs/a/data/tokenizer.json", "train", "valid"), 9000, 500, 0.25)


@pytest.mark.parametrize("words", [[], ["optimizer.lr=0.123", "seed=7", "model.mup.base_width=64"], ["train.epochs=3"]])
def test_the_text_is_read_as_the_config_that_was_meant(values, words, tmp_path):
    config = load(values, words)
    file = tmp_path / "start.yml"
    file.write_text(commented(overridden(values, config), ["what it is"]))
    assert load_config(file) == config
    assert max(map(len, file.read_text().splitlines())) <= 110


def test_the_run_saves_by_time(values):
    config = load(values, [])
    assert (config.checkpoint.save_minutes, config.checkpoint.every) == (10.0, None)


def test_what_was_asked_for_is_marked_as_such(values):
    text = commented(overridden(values, load(values, ["train.batch_size=4", "train.micro_batch_size=4"])), [])
    lines = [line for line in text.splitlines() if line.strip().startswith("batch_size:")]
    assert lines == [line for line in lines if "4" in line and "as you asked" in line] and len(lines) == 1


def test_unknown_words_are_refused(values):
    with pytest.raises(ConfigError, match=r"train\.step"):
        load(values, ["train.step=3"])
