import json
import math
import re

import pytest
from typer.testing import CliRunner

from castalia.cli.main import build
from castalia.cli.train import train
from castalia.errors import ConfigError, TrainingError
from castalia.observe.metrics import read_metrics
from castalia.tune.lr_find import find_rate, suggest


@pytest.fixture(scope="module")
def trial(tiny):
    return find_rate(tiny("unused"), 1e-5, 10.0, 60)


def test_the_rate_rises_until_the_loss_diverges(trial):
    assert trial.diverged and len(trial.losses) < 60
    factors = [after / before for before, after in zip(trial.rates, trial.rates[1:], strict=False)]
    assert factors == pytest.approx([1e6 ** (1 / 59)] * len(factors))
    assert trial.rates[0] == 1e-5
    assert trial.rates[0] < trial.suggestion <= trial.lowest < trial.rates[-1]


def test_it_is_repeatable_and_writes_nothing(trial, tiny, tmp_path):
    assert find_rate(tiny(tmp_path / "run"), 1e-5, 10.0, 60) == trial
    assert not (tmp_path / "run").exists()


def test_the_suggestion_trains(trial, tiny, tmp_path):
    train(tiny(tmp_path / "run", f"optimizer.lr={trial.suggestion}", "eval.batches=0"))
    losses = [record["loss"] for record in read_metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] - 1.5


def test_the_suggestion_is_where_the_loss_falls_fastest():
    rates = [10 ** (-6 + step / 20) for step in range(120)]
    losses = [5 - 3 / (1 + math.exp(-(step - 60) / 5)) + (0.2 * (step - 90) if step > 90 else 0) for step in range(120)]
    suggestion, lowest = suggest(rates, [*losses[:-1], math.inf])
    assert suggestion == pytest.approx(rates[60], rel=0.2)
    assert rates[80] < lowest < rates[95]


def run_verb(*words):
    return CliRunner().invoke(build("lr-find"), ["lr-find", *map(str, words)], catch_exceptions=False).stdout


def test_the_verb_draws_and_suggests(tiny, tmp_path):
    from castalia.config.load import dump_config

    (tmp_path / "c.yml").write_text(dump_config(tiny(tmp_path / "run")))
    plot = tmp_path / "out" / "lr.png"
    words = [tmp_path / "c.yml", "--lowest", "1e-4", "--steps", "30"]
    said = run_verb(*words, "--plot", plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = json.loads(run_verb(*words, "--json"))
    *_, line, _ = said.splitlines()
    assert line == f"castalia train {words[0]} optimizer.lr={found['suggestion']:.1e}"
    rows = [row.split() for row in said.splitlines() if re.match(r" +\d\.\d\de", row)]
    assert "loss, over the learning rate" in said and "a smoothed" in said
    assert [row[0] for row in rows if row[-1] == "lowest"] == [f"{found['lowest']:.2e}"]
    assert min(float(row[2]) for row in rows) == round(min(found["smoothed"]), 4)  # the table agrees with the verdict
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yml", "out"]


def test_what_finds_nothing_is_an_error(tiny, corpus):
    with pytest.raises(TrainingError, match="the loss did not fall at any rate from 1.0e-12"):
        find_rate(tiny("unused"), 1e-12, 1e-11, 20)
    with pytest.raises(TrainingError, match="the loss is nan before anything was learned"):
        suggest([1e-6], [math.nan])
    with pytest.raises(ConfigError, match="--lowest 1 must be positive and below --highest 0.1"):
        run_verb("pythia-14m", f"data.path={corpus}", "tokenizer.kind=bytes", "--lowest", "1", "--highest", "0.1")
    with pytest.raises(ConfigError, match="no data"):
        run_verb("model.num_layers=1", "model.hidden_size=8", "model.num_heads=1", "model.vocab_size=64")
