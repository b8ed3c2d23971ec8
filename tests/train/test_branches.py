"""Runs whose rows are changed, and runs that begin with a step of another one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from castalia.cli.train import branch_words, read_config
from castalia.data.config_corpora import open_data
from castalia.data.indexed import bin_path, idx_path, open_dataset
from castalia.errors import ConfigError, TrainingError
from castalia.observe.metrics import read_metrics
from castalia.train.loop import train
from castalia.tune.replay import replay
from tests.train.test_loop import assert_equal_runs, events, losses

STEP, ROW = 12, 5


@pytest.fixture(scope="module")
def changed(tiny, corpus, tmp_path_factory) -> tuple[Path, Path]:
    """A corpus with other ids within one row, and a file with that row."""
    folder = tmp_path_factory.mktemp("changed")
    samples = open_data(tiny(folder / "run"))
    position = int(samples.positions(STEP - 1)[ROW])
    at = next(piece for piece in samples.pieces(position) if piece.stop - piece.start > 6)
    for path in (bin_path, idx_path):
        shutil.copy(path(corpus), path(folder / "words"))
    start = int(open_dataset(corpus).starts[at.document]) // 2 + at.start
    tokens = np.memmap(bin_path(folder / "words"), "<u2", "r+")
    tokens[start + 2 : start + 5] = list(b"xyz")  # not the first and the last, which belong to its neighbours, too
    tokens.flush()
    edited = open_data(tiny(folder / "run", f"data.path={folder / 'words'}"))
    ids = edited.sample(position)[0]
    assert not np.array_equal(ids, samples.sample(position)[0])
    line = {"step": STEP, "row": ROW, "ids": ids.tolist()}
    (folder / "rows.jsonl").write_text(json.dumps(line) + "\n")
    return folder / "words", folder / "rows.jsonl"


@pytest.fixture(scope="module")
def intervened(tiny, changed, tmp_path_factory) -> Path:
    return train(tiny(tmp_path_factory.mktemp("intervened") / "run", f"data.intervene={changed[1]}"))


def test_an_intervention_is_as_a_corpus_that_held_the_row(intervened, tiny, changed, tmp_path):
    held = train(tiny(tmp_path / "held", f"data.path={changed[0]}"))
    assert_equal_runs(intervened, held)
    plain = train(tiny(tmp_path / "plain"))
    assert [a == b for a, b in zip(losses(plain), losses(intervened), strict=True)] == [True] * 11 + [False] * 9


def test_a_stopped_run_with_an_intervention_goes_on_as_if_never_stopped(intervened, tiny, changed, tmp_path):
    rows = tmp_path / "rows.jsonl"
    shutil.copy(changed[1], rows)
    run = train(tiny(tmp_path / "run", f"data.intervene={rows}", "train.exit_interval=10"))
    rows.unlink()  # the run has its own
    shutil.move(run, tmp_path / "moved")
    train(read_config([str(tmp_path / "moved"), "train.exit_interval=null"]))
    assert_equal_runs(tmp_path / "moved", intervened)
    assert replay(tmp_path / "moved", STEP)["loss_distance"] == 0.0


def test_weighted_rows_change_the_gradients_by_their_weights(tiny, tmp_path):
    """At weight 0 as a masked row, but divided by as many tokens; at weight 1 as none; the same in micro-batches."""
    file = tmp_path / "rows.jsonl"

    def trained(name, change, *words):
        file.write_text(json.dumps({"step": 3, "row": ROW, **change}) + "\n")
        return losses(train(tiny(tmp_path / name, f"data.intervene={file}", "train.exit_interval=5", *words)))

    plain = losses(train(tiny(tmp_path / "plain", "train.exit_interval=5")))
    assert trained("one", {"weight": 1}) == plain
    none, masked, twice = trained("zero", {"weight": 0}), trained("mask", {"mask": True}), trained("two", {"weight": 2})
    assert none[:2] == plain[:2] == twice[:2]
    assert none[2][1] * 8 / 7 == pytest.approx(masked[2][1], rel=1e-5)  # 7 of 8 rows count
    assert none[2][2] * 8 / 7 == pytest.approx(masked[2][2], rel=1e-4)
    assert (twice[2][1] + none[2][1]) / 2 == pytest.approx(plain[2][1], rel=1e-5)
    small = trained("small", {"weight": 2}, "train.micro_batch_size=2")
    assert [row[1] for row in small] == pytest.approx([row[1] for row in twice], rel=1e-5)


def test_what_if_a_later_step_had_seen_this(intervened, tiny, changed, tmp_path):
    plain = train(tiny(tmp_path / "plain"))
    words = branch_words([str(plain), "checkpoint.step=10", f"data.intervene={changed[1]}"], tmp_path / "branch")
    branch = train(read_config(words))
    assert losses(branch) == losses(intervened)[10:]
    assert replay(branch, STEP)["loss_distance"] == 0.0  # from the trunk's checkpoint
    start = next(event for event in events(branch) if event["event"] == "start")
    assert start["step"] == 10 and Path(start["source"]).resolve().is_relative_to(plain.resolve())
    with pytest.raises(TrainingError, match="the data or their order are not those"):  # step 12 lies behind it
        train(read_config([str(plain), f"data.intervene={changed[1]}", "checkpoint.other_data=false"]))


def test_a_branch_that_changes_nothing_is_its_trunk_and_one_with_other_settings_is_none(tiny, tmp_path):
    trunk = train(tiny(tmp_path / "trunk"))
    same = train(read_config(branch_words([str(trunk), "checkpoint.step=10"], tmp_path / "same")))
    assert losses(same) == losses(trunk)[10:]
    other = ["checkpoint.step=10", "data.seq_length=8", "train.exit_interval=15", "schedule.min_lr=0.005"]
    other += ["checkpoint.schedule_from=config"]
    branch = train(read_config(branch_words([str(trunk), *other], tmp_path / "other")))
    assert [step for step, *_ in losses(branch)] == [11, 12, 13, 14, 15]
    assert next(read_metrics(branch))["lr"] > next(read_metrics(same))["lr"]
    train(read_config([str(branch), "train.exit_interval=null"]))
    straight = train(read_config(branch_words([str(trunk), *other[:2], *other[3:]], tmp_path / "straight")))
    assert_equal_runs(branch, straight)


def test_a_run_with_stages_is_its_trunk_and_a_branch_of_it(tiny, changed, tmp_path):
    """Bit for bit, stopped within a stage or not."""
    stage = f"data.stages=[{{first_step: 11, train: {changed[0]}, seq_length: 8}}]"
    data = tiny(tmp_path / "x").data.path
    whole = train(tiny(tmp_path / "whole", stage))
    trunk = train(tiny(tmp_path / "trunk", "train.exit_interval=10"))
    words = [str(trunk), "checkpoint.step=10", "data.path=null", f"data.train={changed[0]}", "data.seq_length=8"]
    branch = train(read_config(branch_words(words, tmp_path / "branch")))
    assert data and losses(whole)[:10] == losses(trunk)
    assert losses(whole)[10:] == losses(branch)
    stopped = train(tiny(tmp_path / "stopped", stage, "train.exit_interval=10"))
    shutil.move(stopped, tmp_path / "moved")
    train(read_config([str(tmp_path / "moved"), "train.exit_interval=null"]))
    assert_equal_runs(tmp_path / "moved", whole)
    assert replay(tmp_path / "moved", 14)["loss_distance"] == 0.0
    # Whoever thinks of a stage only then resumes with it.
    train(read_config([str(trunk), stage, "train.exit_interval=null"]))
    assert losses(trunk) == losses(whole)


def test_words_that_make_no_branch(straight, tmp_path):
    for words, folder, message in [
        (["run.yml"], tmp_path / "b", "name the folder of one run"),
        ([str(straight)], straight, "another one than the run's"),
        ([str(straight), "checkpoint.dir=x"], tmp_path / "b", "given once"),
    ]:
        with pytest.raises(ConfigError, match=message):
            branch_words(words, folder)
    shutil.copytree(straight, tmp_path / "b")
    with pytest.raises(ConfigError, match="holds a run; to continue it"):
        branch_words([str(straight)], tmp_path / "b")
