"""Stages of the data: from some steps on other corpora or lengths, as a pure function of the step."""

from pathlib import Path

import numpy as np
import pytest

from castalia.config.batch import tokens_until
from castalia.config.check import refuse_contradictions
from castalia.config.schema import TokenizerConfig
from castalia.data.batch_rows import table_rows
from castalia.data.config_corpora import open_data
from castalia.data.seen import seen_in_run
from castalia.data.tokenizer import load_tokenizer
from castalia.errors import ConfigError
from tests.data.test_loader import config, corpus


@pytest.fixture
def plain(tmp_path: Path):
    """Four steps of two rows of five tokens."""
    return config(corpus(tmp_path / "x", [list(range(20, 45))] * 8)).with_({"model.vocab_size": 250})


@pytest.fixture
def other(tmp_path: Path) -> str:
    return corpus(tmp_path / "y", [list(range(60, 120))] * 8).path


def test_each_step_is_as_in_a_run_that_is_in_this_stage_from_the_start(plain, other) -> None:
    staged = plain.with_({"data.stages": [{"first_step": 2, "train": other}, {"first_step": 4, "seq_length": 3}]})
    second = open_data(plain.with_({"data.path": None, "data.train": other}))
    third = open_data(plain.with_({"data.seq_length": 3}))
    samples, first = open_data(staged), open_data(plain)
    for step, expected in enumerate([first, second, second, third]):
        found, wanted = samples.batch(step), expected.batch(step)
        assert np.array_equal(found.tokens, wanted.tokens) and np.array_equal(found.labels, wanted.labels)
        assert np.array_equal(samples.batch(step, [1]).tokens, wanted.tokens[1:])
        assert table_rows(samples, step, None) == table_rows(expected, step, None)
        assert samples.length(step) == found.tokens.shape[1]
    assert tokens_until(staged, 2, 4) == 2 * (5 + 5 + 5 + 3) and tokens_until(staged, 2, 1) == 10
    assert tokens_until(staged, 2, 10) == 2 * (3 * 5 + 7 * 3)


def test_a_stage_that_has_not_begun_changes_no_fingerprint(plain, other) -> None:
    before, after = open_data(plain), open_data(plain.with_({"data.stages": [{"first_step": 3, "train": other}]}))
    assert before.fingerprint_until(2) == after.fingerprint_until(2)
    assert before.fingerprint_until(3) != after.fingerprint_until(3)
    assert before.fingerprint != after.fingerprint


def test_places_of_a_text_are_those_of_its_stage(plain, other) -> None:
    staged = plain.with_({"data.stages": [{"first_step": 3, "train": other}]})
    samples, words = open_data(staged), load_tokenizer(TokenizerConfig(kind="bytes"))
    for text in (bytes([30, 31]), bytes([90, 91])):
        (found,) = seen_in_run(samples, 4, [text.decode()], words)
        wanted = [
            (step + 1, row, offset)
            for step in range(4)
            for row, ids in enumerate(table_rows(samples, step, None))
            for offset in range(len(ids["ids"]) - 1)
            if bytes(ids["ids"][offset : offset + 2]) == text and offset < samples.length(step)
        ]
        assert [(place.step, place.row, place.offset) for place in found.places] == wanted
        assert {place.step <= 2 for place in found.places} == {text[0] == 30}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.stages": [{"first_step": 3}, {"first_step": 3}]}, "list them in rising order"),
        ({"data.stages": [{"first_step": 3, "seq_length": 9}]}, "seq_length=9 is above data.seq_length=5"),
        ({"data.stages": [{"first_step": 3}], "neox_exact": True}, "GPT-NeoX has no stages"),
        ({"data.stages": [{"first_step": 3}], "data.seq_length_warmup": {"start": 1, "steps": 2}}, "as stages"),
        ({"data.stages": [{"first_step": 0}]}, "first_step"),
    ],
)
def test_stages_that_contradict_the_run(plain, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        refuse_contradictions(plain.with_(change))
