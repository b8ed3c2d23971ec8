"""With `train.recompute=auto` memory says how many blocks are computed again, a clock which; losses keep their bits."""

from __future__ import annotations

import json

import pytest

from castalia.config.load import load_run
from castalia.observe.metrics import read_metrics
from castalia.plan.memory import BlockKind
from castalia.plan.recompute import ranks_of
from castalia.train import recomputing
from castalia.train.dry_run import rehearse
from castalia.train.loop import train
from castalia.train.run_header import HEADER
from castalia.train.setup import start

WORDS = ["model.num_layers=4", "data.seq_length=64", "train.micro_batch_size=8"]
WORDS += ["model.hidden_dropout=0.1", "model.attention_dropout=0.1", "train.steps=6"]
MIXED = [*WORDS, "model.pattern=[mamba, attention]", "model.hidden_dropout=0", "model.attention_dropout=0"]


def planned(session):
    """Peak bytes if no block is computed again, and if all are."""
    rank = session.step.recomputing.rank
    return [
        ranks_of(rank.model, rank.layout, rank.length, rank.compute, usable)[0].memory().total for usable in (10**15, 0)
    ]


@pytest.fixture
def halfway(tiny, tmp_path, monkeypatch):
    """A function: makes half of what recomputing everything saves fit; returns a function from a folder to configs."""

    def limit(words, part=0.5):
        monkeypatch.setattr(recomputing, "usable_memory", lambda device, communicators: 10**15)
        none, full = planned(start(tiny(tmp_path / "unused", *words, "train.recompute=auto")))
        usable = int(full + part * (none - full))
        monkeypatch.setattr(recomputing, "usable_memory", lambda device, communicators: usable)
        return lambda folder, how="auto", *more: tiny(tmp_path / folder, *words, *more, f"train.recompute={how}")

    return limit


def losses(folder):
    return [(record["loss"], record["grad_norm"]) for record in read_metrics(folder)]


def events(folder):
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "recompute"]


@pytest.mark.parametrize("words", [WORDS, MIXED], ids=["dropout", "mamba and attention"])
def test_computing_some_blocks_again_changes_no_bit(halfway, words):
    config = halfway(words)
    plain, chosen = train(config("none", "none")), train(config("auto"))
    assert losses(plain) == losses(chosen)
    (event,) = events(chosen)
    assert 0 < len(event["computed_again"]) < 4
    assert event["planned_bytes"] <= event["usable_bytes"]
    assert event["seconds"] and all(0 < seconds < 60 for seconds in event["seconds"].values())
    assert event["seconds"].keys() == event["freed_bytes"].keys()
    assert "the first step computes all again and measures which" in " ".join((chosen / HEADER).read_text().split())
    assert events(plain) == []


def test_a_resumed_run_measures_anew_and_goes_on_with_the_same_bits(halfway):
    config = halfway(WORDS)
    plain, folder = train(config("none", "none")), train(config("auto", "auto", "train.exit_interval=3"))
    train(load_run(folder).with_({"train.exit_interval": None}))
    assert losses(folder) == losses(plain)
    assert [event["step"] for event in events(folder)] == [1, 4]


def test_where_all_fits_nothing_is_measured_and_where_nothing_fits_all_is_computed_again(halfway):
    for part, number, words in ((1.0, 0, "usable)"), (-0.5, 4, "does not fit)")):
        session = start(halfway(WORDS, part)(f"run{number}"))
        assert session.step.recomputing.is_open == (number > 0)
        session.step(0, session.batch(0))
        assert len(session.step.recomputing.rank.again) == number
        assert str(session.step.recomputing).startswith(f"{number} of 4 blocks")
        assert words in str(session.step.recomputing)


def test_the_slowest_rank_says_what_a_kind_costs(halfway, monkeypatch):
    session = start(halfway(MIXED, 0.9)("run"))  # one block of either kind is enough
    choice, (mamba, dense) = session.step.recomputing, (BlockKind("mamba"), BlockKind("dense"))
    kinds = [mamba, dense] * 2
    for slow, fast in ((mamba, dense), (dense, mamba)):
        other = {slow: 1000.0, fast: 1e-9}
        monkeypatch.setattr(session.executor, "gather", lambda own, other=other: [own, other])
        choice.is_open = True
        for recomputation in recomputing.recomputations(session.executor.models).values():
            recomputation.on = True
            recomputation.measure(session.device)
        session.step(0, session.batch(0))
        assert choice.seconds[slow] == 1000
        assert 1e-9 < choice.seconds[fast] < 60  # this rank's own
        assert {kinds[number] for number in choice.rank.again} == {fast}
        on = {n for n, each in recomputing.recomputations(session.executor.models).items() if each.on}
        assert on == choice.rank.again


def test_compiled_blocks_are_chosen_by_the_plan_before_the_first_step(halfway):
    session = start(halfway(WORDS)("run"))
    rank, usable = session.step.recomputing.rank, session.step.recomputing.usable
    choice = recomputing.Recomputing(session.executor, rank, usable, measures=False)
    assert not choice.is_open and not choice.seconds
    assert 0 < len(choice.rank.again) < 4
    on = {n for n, each in recomputing.recomputations(session.executor.models).items() if each.on}
    assert on == choice.rank.again


def test_a_dry_run_tells_what_is_chosen(halfway, capsys):
    config = halfway(WORDS)
    full, report = rehearse(config("full", "full")), rehearse(config("run"))
    out = " ".join(capsys.readouterr().out.split())
    assert "of 4 blocks of this rank" in out and "measured: " in out
    # The step measures, so that it computes all blocks again.
    assert report["planned_bytes"] == full["planned_bytes"]
    assert report["memory_bytes"] == pytest.approx(full["memory_bytes"], rel=0.01)


@pytest.mark.slow
def test_compiled_blocks_that_are_computed_again_train_alike(halfway):
    config = halfway([*WORDS, "model.hidden_dropout=0", "model.attention_dropout=0", "train.compile=true"])
    plain, chosen = train(config("none", "none")), train(config("auto"))
    (event,) = events(chosen)
    assert 0 < len(event["computed_again"]) < 4
    assert not event["seconds"]  # by operations
    for (loss, _), (other, _) in zip(losses(plain), losses(chosen), strict=True):
        assert loss == pytest.approx(other, rel=1e-6)
