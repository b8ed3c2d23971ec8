"""Evaluations on all validation data, and runs that stop when these find nothing better."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from castalia.checkpoint.formats.native.read import saved_steps
from castalia.checkpoint.formats.native.save import best_step
from castalia.config.load import load_run
from castalia.data.config_corpora import open_data
from castalia.data.indexed import open_dataset
from castalia.data.pairs import open_samples
from castalia.data.split import split_documents
from castalia.observe.metrics import read_metrics
from castalia.train.loop import train
from castalia.train.setup import start

ALL = "eval.batches=null"


def test_a_whole_pass_predicts_each_token_of_each_document_once(tiny, tmp_path, corpus):
    config = tiny(tmp_path, ALL)
    text = open_dataset(corpus)
    held = split_documents(config.data, text)["valid"]
    batches = list(open_data(config, "valid").whole_pass(4))
    seen = np.concatenate([batch.labels[batch.loss_mask] for batch in batches])
    assert seen.tolist() == [token for document in held for token in text[document][1:].tolist()]
    assert {len(batch.tokens) for batch in batches[:-1]} == {4} and len(batches) > 2


def test_ranks_share_a_whole_pass(tiny, tmp_path):
    data = open_data(tiny(tmp_path, ALL), "valid")
    whole = np.concatenate([batch.tokens for batch in data.whole_pass(6, 6)])
    shares = [[batch.tokens for batch in data.whole_pass(6, 6, rank, 2)] for rank in range(2)]
    assert len(whole) % 6 == 0 and [len(each) for each in shares[0]] == [len(each) for each in shares[1]]
    assert np.array_equal(whole[:6], np.stack([shares[0][0], shares[1][0]], axis=1).reshape(6, -1))


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_whole_pass_over_judged_texts(tmp_path, objective, paired):
    config = paired(objective)
    data = open_samples(config, "valid")
    texts = [batch.tokens for batch in data.whole_pass(4, 4 if objective == "kto" else 1)]
    sides = 2 if objective == "dpo" else 1
    assert [len(each) for each in texts] == ([8, 2] if objective == "dpo" else [4, 4])
    assert len(np.unique(np.concatenate(texts), axis=0)) == 5 * sides


@pytest.fixture
def paired(tmp_path):
    """A function: objective -> config with five pairs, or five judged texts, as validation data."""
    import json

    from castalia.config.load import load_config
    from castalia.data.dataset_writer import DatasetWriter

    for side, first in (("pos", 10), ("neg", 20)):
        with (
            DatasetWriter(tmp_path / side, "int32") as writer,
            DatasetWriter(tmp_path / f"{side}_l", "int32") as labels,
        ):
            for number in range(5):
                writer.add([first + number] * 4)
                labels.add([-100, -100, first + number, first + number])
    with DatasetWriter(tmp_path / "rewards", "int32") as writer:
        for number in range(5):
            writer.add([1 if number % 2 else -1])

    def make(objective: str):
        source = {"path": f"{tmp_path}/pos", "labels": f"{tmp_path}/pos_l"}
        rejected = {"path": f"{tmp_path}/neg", "labels": f"{tmp_path}/neg_l"}
        source |= {"rewards": f"{tmp_path}/rewards"} if objective == "kto" else {"rejected": rejected}
        words = [f"data.{split}={json.dumps([source])}" for split in ("train", "valid")]
        words += [f"train.objective={objective}", "data.packing=unpacked", "data.seq_length=8", "train.steps=2"]
        return load_config([], [*words, "train.batch_size=4", ALL])

    return make


def test_every_evaluation_takes_the_same_data(tiny, tmp_path):
    """With a rate of almost nothing the loss stays the same, which it does not on other stretches."""
    quiet = ["optimizer.lr=1e-12", "optimizer.weight_decay=0", "train.steps=10"]
    run = Path(train(tiny(tmp_path / "run", ALL, *quiet)))
    losses = [record["valid_loss"] for record in read_metrics(run) if "valid_loss" in record]
    assert len(losses) == 2 and losses[0] == pytest.approx(losses[1], abs=1e-6)
    session = start(load_run(run))
    data = open_data(session.config, "valid")
    from castalia.evaluate.perplexity import evaluate

    assert evaluate(session.executor, data.whole_pass(8))["loss"] == pytest.approx(losses[1], abs=1e-6)


def test_a_run_stops_when_its_validation_loss_stays(tiny, tmp_path, capsys):
    options = [ALL, "optimizer.lr=0.5", "schedule.style=constant", "eval.every=1", "eval.patience=3"]
    run = Path(train(tiny(tmp_path / "run", *options)))
    said = capsys.readouterr().out
    losses = [record["valid_loss"] for record in read_metrics(run)]
    best, last = int(np.argmin(losses)) + 1, len(losses)
    assert last == best + 3 < 20 and f"stopped after step {last} of 20 (eval.patience)" in said
    assert f"to continue: castalia train {run} eval.patience=null\n" in said
    assert best_step(run / "checkpoints") == best and max(saved_steps(run / "checkpoints")) == last
    train(load_run(run))
    assert "the run has stopped as eval.patience says" in capsys.readouterr().out
    assert len(list(read_metrics(run))) == last
    train(load_run(run, ["eval.patience=null", "train.steps=20"]))
    assert len(list(read_metrics(run))) == 20
