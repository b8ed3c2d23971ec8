from __future__ import annotations

import csv

import pytest

pytest.importorskip("lm_eval")


@pytest.mark.slow
def test_each_step_has_the_scores_that_eval_gives(trained, tmp_path, monkeypatch):
    from castalia.cli import series
    from castalia.cli.tasks import open_task_model
    from castalia.series.members import find_series
    from castalia.tasks.task_options import TaskOptions
    from castalia.tasks.task_run import run_tasks

    run, output = trained("data.seq_length=128", "train.steps=2"), tmp_path / "scores.csv"
    series.evaluate([str(run)], output, tasks="castalia_demo", limit=2, steps="0,2")
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["step"] for row in rows} == {"0", "2"}
    member = find_series([run], "2")[0]
    model = open_task_model(member.open(), [], None)[0]
    results = run_tasks(model, TaskOptions(("castalia_demo",), limit=2))["results"]
    found = {(row["task"], row["metric"]): float(row["value"]) for row in rows if row["step"] == "2"}
    assert found
    for (task, metric), value in found.items():
        assert any(key.startswith(f"{metric},") and shown == value for key, shown in results[task].items())
    assert not list(tmp_path.glob(".*journal*"))
