from __future__ import annotations

import csv

import pytest

pytest.importorskip("lm_eval")


@pytest.mark.slow
def test_each_step_has_the_scores_that_eval_gives(trained, tmp_path, capsys, monkeypatch):
    from castalia.cli import series
    from castalia.cli.tasks import open_for_tasks
    from castalia.series.members import find_series
    from castalia.tasks.task_options import TaskOptions
    from castalia.tasks.task_run import run_tasks

    run, output = trained("data.seq_length=128", "train.steps=2"), tmp_path / "scores.csv"
    series.evaluate([str(run)], output, tasks="castalia_demo", limit=2, steps="0,2", plot=tmp_path / "scores.svg")
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["step"] for row in rows} == {"0", "2"}
    member = find_series([run], "2")[0]
    model = open_for_tasks(member.open())[0]
    results = run_tasks(model, TaskOptions(("castalia_demo",), limit=2))["results"]
    found = {(row["task"], row["metric"]): float(row["value"]) for row in rows if row["step"] == "2"}
    assert found
    for (task, metric), value in found.items():
        assert any(key.startswith(f"{metric},") and shown == value for key, shown in results[task].items())
    drawn = (tmp_path / "scores.svg").read_text()
    assert "castalia_demo_last_word" in drawn and "bits_per_byte" in drawn
    said = capsys.readouterr().out
    assert "castalia_demo_second_half" in said and "acc_norm" in said
    assert not list(tmp_path.glob(".*journal*"))
