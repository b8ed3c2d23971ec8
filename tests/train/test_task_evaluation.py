"""Tasks during training: when they are asked, where their values go, and that nothing of them ends a run."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install castalia[eval]")

from castalia.errors import DataError  # noqa: E402
from castalia.observe.metrics import read_events, read_metrics  # noqa: E402
from castalia.tasks.harness import TaskModel  # noqa: E402
from castalia.train.loop import train  # noqa: E402
from castalia.train.task_evaluation import TaskEvaluation  # noqa: E402

ASK = ("eval.tasks=[castalia_demo_last_word,castalia_demo_verses]", "eval.tasks_limit=2", "eval.tasks_every=10")


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder)]


def test_values_stand_in_the_records(tiny, tmp_path: Path) -> None:
    folder = train(tiny(tmp_path / "run", *ASK))
    records = {record["step"]: record for record in read_metrics(folder)}
    asked = [step for step, record in records.items() if "castalia_demo_verses/bits_per_byte" in record]
    assert asked == [10, 20] and "castalia_demo_last_word/acc" in records[20] and "valid_loss" in records[20]
    assert records[20]["castalia_demo_verses/bits_per_byte"] < records[10]["castalia_demo_verses/bits_per_byte"]
    assert [event["step"] for event in read_events(folder) if event["event"] == "tasks"] == [10, 20]
    assert losses(folder) == losses(train(tiny(tmp_path / "without")))  # training is not touched


def test_a_step_that_is_not_saved_otherwise_is_saved_first(tiny, tmp_path: Path) -> None:
    folder = train(tiny(tmp_path / "run", *ASK[:2], "eval.tasks_every=5", "train.steps=5", "eval.every=null"))
    assert "castalia_demo_last_word/acc" in list(read_metrics(folder))[-1]


def test_a_failing_task_does_not_end_training(tiny, tmp_path: Path, monkeypatch, capfd) -> None:
    def fails(self, requests, disable_tqdm=False):
        raise RuntimeError("no answer")

    monkeypatch.setattr(TaskModel, "loglikelihood_rolling", fails)
    folder = train(tiny(tmp_path / "run", *ASK))
    failed = [event for event in read_events(folder) if event["event"] == "task failed"]
    assert [(event["step"], event["error"]) for event in failed] == [(10, "no answer"), (20, "no answer")]
    assert "castalia_demo_last_word/acc" in list(read_metrics(folder))[-1]
    assert "castalia_demo_verses failed, and training continues: no answer" in capfd.readouterr().out


def test_a_model_that_cannot_be_asked_does_not_end_training(tiny, tmp_path: Path, monkeypatch) -> None:
    def fails(self, folder, step, received):
        raise MemoryError("no room for a second model")

    monkeypatch.setattr(TaskEvaluation, "_model", fails)
    folder = train(tiny(tmp_path / "run", *ASK))
    failed = [event["error"] for event in read_events(folder) if event["event"] == "task failed"]
    assert failed == ["no room for a second model"] * 2 and len(list(read_metrics(folder))) > 0


def test_unknown_tasks_are_refused_before_the_first_step(tiny, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no task castalia_demo_nothing"):
        train(tiny(tmp_path / "run", "eval.tasks=[castalia_demo_nothing]"))
