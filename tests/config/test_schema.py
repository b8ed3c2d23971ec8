"""Values of a config are read and changed by their paths."""

from __future__ import annotations

import pytest

from castalia.config.load import load_config
from castalia.config.schema import ModelConfig, RunConfig, Source
from castalia.errors import ConfigError

MODEL = ["model.num_layers=4", "model.hidden_size=64", "model.num_heads=4"]


def test_changed_values_leave_all_others_their_origins_and_notes_as_they_are():
    config = load_config([], [*MODEL, "train.steps=8", "optimizer.momentum=0.5"])
    changed = config.with_({"train.steps": 5, "train.batch_size": 2, "model.num_layers": 1, "seed": 3, "log.every": 7})
    assert (changed.train.steps, changed.train.batch_size, changed.model.num_layers, changed.seed) == (5, 2, 1, 3)
    assert changed.with_({name: config.at(name) for name in ("train", "model", "seed", "log")}) == config
    assert changed.origins == config.origins
    assert changed.notes == config.notes != ()
    assert changed.with_notes("more").notes == (*config.notes, "more")
    assert config.train.steps == 8


def test_values_that_a_file_may_not_have_are_refused():
    config = load_config([], MODEL)
    with pytest.raises(ConfigError, match="^train.steps=2.5 is not a whole number\ntrain.batch_size=0 is not greater"):
        config.with_({"train.steps": 2.5, "train.batch_size": 0})
    with pytest.raises(ConfigError, match="is unknown"):
        config.with_({"train.stepz": 5})


def test_only_what_is_given_counts_as_given():
    model = ModelConfig(num_layers=1, hidden_size=8, num_heads=1).with_({"vocab_size": 3})
    assert model.model_fields_set == {"num_layers", "hidden_size", "num_heads", "vocab_size"}


def test_whole_sections_and_entries_of_lists_take_the_place_of_others():
    config = RunConfig().with_({"data.train": (Source(path="a", weight=2.0),)})
    assert config.data.train[0].with_({"path": "b"}) == Source(path="b", weight=2.0)
    assert config.with_({"data": RunConfig().data}) == RunConfig()


def test_a_path_leads_to_a_value():
    config = load_config([], [*MODEL, "optimizer.lr=0.5"])
    assert config.at("optimizer.lr") == 0.5
    assert config.at("model.hidden_size") == 64
    assert config.at("model.mup.base_width") is None
    assert RunConfig().at("model.hidden_size") is None
