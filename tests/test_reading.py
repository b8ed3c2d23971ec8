"""One reader for each kind of text: what it takes, what it refuses, and that it does so in bounded time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castalia.config.load import load_config
from castalia.errors import CastaliaError, CheckpointError, ConfigError, DataError
from castalia.reading import (
    MAX_DEPTH,
    expression_problem,
    fits,
    keys,
    parse_json,
    read_json,
    read_records,
    short,
    typed,
)
from tests.attacks.bad_configs import PATTERNS, TEXTS

RECORD = keys({"step": int, "loss": float | None, "inner": keys({"name": str}, ["name"])}, ["step"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_what_is_no_stranger_comes_as_it_is(value: object) -> None:
    assert parse_json(json.dumps(value), "it", DataError) == value
    assert parse_json(json.dumps(value).encode(), "it", DataError) == value


@given(VALUES)
def test_any_value_is_of_the_type_or_is_named(value: object) -> None:
    for text in (json.dumps(value), json.dumps({"step": value}), json.dumps({"step": 1, "inner": {"name": value}})):
        try:
            record = parse_json(text, "a.json", DataError, RECORD)
        except DataError as error:
            assert str(error).startswith("a.json")
        else:
            assert type(record["step"]) is int


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": "1"}', "a.json: step='1' is not a whole number"),
        ('{"step": true}', "a.json: step=True is not a whole number"),
        ('{"step": 1, "loss": "x"}', "a.json: loss='x' is not a number"),
        ('{"step": 1, "inner": {"name": []}}', r"a.json: inner.name=\[\] is not text"),
        ('{"step": 1, "inner": {}}', "a.json: inner.name is missing"),
        ('{"loss": 1}', "a.json: step is missing"),
        ("[1]", "a.json is damaged: it holds a list instead of an object"),
        ("{", "a.json is damaged, it cannot be parsed: Expecting"),
        ("[" * 100_000, "nested too deep"),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "nested too deep"),
        ('{"step": ' + "9" * 5000 + "}", "a.json is damaged, it cannot be parsed"),
        ('{"step": ' + "9" * 400 + '.5, "a": "' + "x" * 9000 + '"}', "a.json: step=inf is not a whole number"),
    ],
)
def test_each_damage_has_its_message(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        parse_json(text, "a.json", DataError, RECORD)
    assert len(str(caught.value)) < 300


def test_nothing_is_converted_and_other_keys_stay() -> None:
    record = {"step": 1, "loss": 2, "other": {"deep": [1, "a"]}}
    assert typed(record, "it", DataError, RECORD) == record
    with pytest.raises(CheckpointError, match="step=1.0 is not a whole number"):
        typed({"step": 1.0}, "it", CheckpointError, RECORD)


def test_files_that_are_not_there_or_no_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"cannot read {tmp_path}/a.json: No such file"):
        read_json(tmp_path / "a.json", DataError)
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match="a.json is damaged, .* not UTF-8 at byte 7"):
        read_json(tmp_path / "a.json", DataError)
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')  # with the mark that some editors write
    assert read_json(tmp_path / "a.json", DataError) == {"a": 1}


def test_a_bad_record_is_named_once_and_left_out(capsys: pytest.CaptureFixture) -> None:
    lines = [b'{"step": 1}\n', b'{"step": "2"}\n', b"\n", b'{"step": 3}\n', b'{"step": 4']
    for _ in range(2):
        assert [record["step"] for record in read_records(lines, "m.jsonl", RECORD)] == [1, 3]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "m.jsonl:2: step='2' is not a whole number; this record is left out" in told[0]
    assert "m.jsonl:3" in told[1]


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_every_odd_config_is_refused(number: int, tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_bytes(TEXTS[number].encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError) as caught:
        load_config([tmp_path / "a.yml"])
    assert all(line.startswith(str(tmp_path)) and len(line) < 1000 for line in str(caught.value).splitlines())


def test_aliases_that_are_meant_are_followed(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text("train: &train {steps: 7}\nlog: {}\n", encoding="utf-8")
    (tmp_path / "b.yml").write_text("data: {train: [{path: &p a}, {path: *p}]}\n", encoding="utf-8")
    config = load_config([tmp_path / "a.yml", tmp_path / "b.yml"])
    assert config.train.steps == 7 and [source.path for source in config.data.train] == ["a", "a"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_no_expression_is_refused(pattern: str) -> None:
    assert expression_problem(pattern)
    with pytest.raises(CastaliaError, match="is not a valid regular expression"):
        fits(pattern, "blocks.0.attn.qkv.weight")
    with pytest.raises(ConfigError, match="finetune.freeze: .* is not a valid regular expression"):
        load_config([], [f"finetune.freeze={json.dumps([pattern])}"])


@pytest.mark.parametrize("pattern", ["(a+)+$", "^(a|a)*$", "^(a|aa)+$", "(.*)*x", "(?:a?){60}a{60}$", "([a-z.0-9]+)*!"])
def test_expressions_that_take_for_ever_elsewhere_end(pattern: str) -> None:
    """By backtracking these try 2^50 ways and more."""
    assert not fits(pattern, "a" * 50 + "b")


def test_expressions_are_searched_anywhere() -> None:
    assert fits("norm", "blocks.0.norm1.weight") and not fits("^norm", "blocks.0.norm1.weight")
    assert fits(r"^blocks\.(0|1)\.", "blocks.1.mlp.up.weight") and fits("", "anything")


def test_long_values_are_cut_in_messages() -> None:
    assert short(10**5000) == "a giant number" and short("x" * 10_000).endswith("xxx...") and short([1]) == "[1]"
