from __future__ import annotations

import json

import pytest

from castalia.errors import DataError
from castalia.series.losses import evaluate_series, measure_of
from castalia.series.members import find_series
from castalia.series.models import ModelsAhead
from castalia.train.evaluation import evaluate_checkpoint
from tests.series import changes
from tests.series.changes import steps_of


@pytest.fixture
def tokenizer():
    from castalia.config.schema import TokenizerConfig
    from castalia.data.tokenizer import load_tokenizer

    return load_tokenizer(TokenizerConfig(kind="bytes"))


def test_each_step_has_the_loss_that_eval_gives(trained, tokenizer, tmp_path):
    members = find_series([trained()], "0,8,20")
    measure = measure_of(members[-1].open(), None, tokenizer)
    rows = evaluate_series(members, measure, tmp_path / "losses.csv")
    assert [row["step"] for row in rows] == [0, 8, 20]
    for row, member in zip(rows, members, strict=True):
        alone = evaluate_checkpoint(member.open())
        assert (row["loss"], row["tokens"], row["bits_per_byte"]) == (
            alone["loss"], alone["tokens"], alone["bits_per_byte"],
        )  # fmt: skip
    assert rows[0]["loss"] > rows[1]["loss"] > rows[2]["loss"]


def test_texts_of_a_file_and_several_at_once(trained, tokenizer, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("the light was good", "and there was day")))
    members = find_series([trained()], "0,8,20")
    measure = measure_of(members[-1].open(), str(texts), tokenizer)
    one, three = (evaluate_series(members, measure, tmp_path / f"{jobs}.csv", jobs=jobs) for jobs in (1, 3))
    assert one == three
    assert measure.windows.stream.num_bytes == 35


def test_equal_weights_are_evaluated_once(trained, copy, tokenizer, tmp_path, monkeypatch):
    from castalia.series import losses

    series = copy(trained())
    changes.taken_from(steps_of(series)[4], steps_of(series)[8])
    members = find_series([series], "2,4,8")
    measure = measure_of(members[-1].open(), None, tokenizer)
    calls = []
    monkeypatch.setattr(losses.Measure, "of", lambda self, model: calls.append(model) or {"loss": float(len(calls))})
    rows = evaluate_series(members, measure, tmp_path / "losses.csv")
    assert [row["loss"] for row in rows] == [1.0, 2.0, 2.0]
    assert rows[1]["weights"] == rows[2]["weights"] != rows[0]["weights"]


def test_an_interrupted_evaluation_goes_on(trained, tokenizer, tmp_path, monkeypatch):
    members = find_series([trained()], "0,4,8,12")
    measure = measure_of(members[-1].open(), None, tokenizer)
    whole = evaluate_series(members, measure, tmp_path / "whole.csv")
    load, asked = ModelsAhead.model, []

    def limited(self, number):
        asked.append(number)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return load(self, number)

    monkeypatch.setattr(ModelsAhead, "model", limited)
    with pytest.raises(KeyboardInterrupt):
        evaluate_series(members, measure, tmp_path / "losses.csv")
    assert evaluate_series(members, measure, tmp_path / "losses.csv") == whole
    assert asked == [0, 1, 2, 2, 3]


def test_other_vocabularies_are_refused(trained, tokenizer, tmp_path):
    from castalia.data.dataset_writer import DatasetWriter

    with DatasetWriter(tmp_path / "other", "uint16") as writer:
        writer.add([1, 300, 2])
    with pytest.raises(DataError, match="token id 300 lies beyond"):
        measure_of(find_series([trained()])[-1].open(), str(tmp_path / "other"), tokenizer)
