from __future__ import annotations

from pathlib import Path

import pytest

from castalia.cli.train import branch_words, read_config
from castalia.errors import CheckpointError, ConfigError
from castalia.series.checkup import check_series
from castalia.series.members import LABEL, find_series, holds, opened, parse_steps
from castalia.train.loop import train


@pytest.mark.parametrize(
    ("name", "step"),
    [("step1000", 1000), ("global_step5", 5), ("step_000010", 10), ("stage1-step1000-tokens5B", 1000)]
    + [("checkpoint-12", 12), ("iter_0001000", 1000), ("main", None), ("best", None), ("footstep3x", None)],
)
def test_names_tell_steps(name, step):
    match = LABEL.fullmatch(name)
    assert (int(match[1]) if match else None) == step


def test_a_run_its_checkpoints_and_a_list_give_the_same(trained):
    run = trained()
    steps = [member.step for member in find_series([run])]
    assert steps == list(range(21))
    assert [member.step for member in find_series([run / "checkpoints"])] == steps
    listed = [run / "checkpoints" / f"step_{step:06d}" for step in (4, 2)]
    assert [(step, checkpoint.progress.step) for step, checkpoint in opened(find_series(listed))] == [(2, 2), (4, 4)]
    assert [member.step for member in find_series([run], "0..2,7,19..")] == [0, 1, 2, 7, 19, 20]


def test_a_branch_is_followed_to_its_trunk(trained, tmp_path, caplog):
    trunk = tmp_path / "trunk"
    trunk.symlink_to(trained())
    more = ["checkpoint.step=6", "schedule.min_lr=0.001", "checkpoint.schedule_from=config", "train.exit_interval=9"]
    branch = train(read_config(branch_words([str(trunk), *more], tmp_path / "branch")))
    twig = train(read_config(branch_words([str(branch), "checkpoint.step=8"], tmp_path / "twig")))
    assert [(member.step, member.path.parts[-3]) for member in find_series([twig])][5:] == [
        (5, "trunk"), (6, "trunk"), (7, "branch"), (8, "branch"), (9, "twig"),
    ]  # fmt: skip
    checkup = check_series(find_series([branch]), run=branch)
    assert [(report.step, report.verdict) for report in checkup.reports] == [(step, "fine") for step in range(10)]
    (tmp_path / "branch").rename(tmp_path / "moved")
    assert [member.step for member in find_series([twig])] == [9]
    assert "is gone: its steps until 8 are left out" in caplog.text


def test_a_branch_may_hold_a_step_in_a_folder_of_its_own(trained, tmp_path):
    for step in (3, 5):
        place = tmp_path / f"step{step}" / f"global_step{step}"
        place.parent.mkdir()
        place.symlink_to(trained() / "checkpoints" / f"step_{step:06d}")
    assert [(step, checkpoint.progress.step) for step, checkpoint in opened(find_series([tmp_path]))] == [
        (3, 3),
        (5, 5),
    ]


def test_genuine_save_folders_are_series(fixtures):
    folder = fixtures / "neox" / "pp1-mp1-z0-fp32-rotary-par" / "checkpoint"
    assert [member.step for member in find_series([folder])] == [5]


def test_cached_revisions_are_a_series(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--lab--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    for step in (1, 2, 16):
        (repository / "snapshots" / f"c{step}").symlink_to(trained() / "checkpoints" / f"step_{step:06d}")
        (repository / "refs" / f"step{step}").write_text(f"c{step}")
    assert [member.step for member in find_series(["lab/tiny@step*"])] == [1, 2, 16]
    assert [member.step for member in find_series(["lab/tiny@step1*"])] == [1, 16]
    with pytest.raises(CheckpointError, match=r"the local cache holds step1, step16, step2 of this model"):
        find_series(["lab/tiny@stage*"])


def test_what_is_no_series_is_refused(tmp_path):
    for word, message in ((tmp_path / "none", "does not exist"), (Path(__file__), "is a file")):
        with pytest.raises(CheckpointError, match=message):
            find_series([word])


def test_ranges_of_steps():
    assert parse_steps("0..4,9,20..")[:2] == [(0, 4), (9, 9)]
    assert [step for step in range(30) if holds(parse_steps("3..4,28.."), step)] == [3, 4, 28, 29]
    with pytest.raises(ConfigError, match=r"'x' is neither a step nor a range"):
        parse_steps("1,x")
