import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from io import StringIO

import pytest
from rich.console import Console

from castalia.checkpoint.formats.native.save import CheckpointSaver
from castalia.cli.status import _table
from castalia.errors import DataError
from castalia.observe.metrics import read_last_metrics, read_metrics, write_event
from castalia.train.status import find_runs, read_status


def test_a_complete_run_tells_its_last_values(straight):
    status = read_status(straight)
    last = list(read_metrics(straight))[-1]
    assert (status.state, status.by, status.step, status.steps, status.saved_step) == ("complete", None, 20, 20, 20)
    assert (status.loss, status.valid_loss) == (last["loss"], pytest.approx(last["valid_loss"]))
    assert status.seconds_left is None and status.message is None


@pytest.mark.parametrize(
    ("event", "state"), [("stop", "stopped"), ("error", "failed"), ("start", "died"), ("save", "died")]
)
def test_the_last_event_tells_how_a_run_ended(straight, tmp_path, event, state):
    run = shutil.copytree(straight, tmp_path / "run")
    write_event(run, event, step=20, message="loss is NaN")
    status = read_status(run)
    assert (status.state, status.message) == (state, "loss is NaN" if state == "failed" else None)
    assert asdict(status)["events"] == ({"error": 1} if event == "error" else {})  # as --json writes it


def test_a_narrow_terminal_cuts_no_number(straight):
    status = replace(read_status(straight), step=11_156, steps=20_000, tokens_per_second=1_234_567.0, folder="runs/a")
    console = Console(width=80, file=StringIO())
    console.print(_table([status]))
    shown = console.file.getvalue()
    assert "11,156/20,000" in shown and "1,234,567" in shown and "complete" in shown and "…" not in shown


def test_a_folder_that_is_held_is_training_and_is_not_disturbed(straight, tmp_path):
    run = shutil.copytree(straight, tmp_path / "run")
    config = (run / "config.yml").read_text()
    (run / "config.yml").write_text(config.replace("steps: 20", "steps: 30", 1))
    with CheckpointSaver(run / "checkpoints"):
        status = read_status(run)
        assert status.state == "training" and status.by.startswith("process ")
        assert status.seconds_left > 0 and status.steps == 30
        (run / "metrics.jsonl").unlink()
        assert read_status(run).state == "starting"
    assert read_status(run).by is None


def test_asking_who_holds_a_folder_keeps_no_run_from_starting(tmp_path):
    """A process asks all the time while runs take the folder and let it go."""
    folder = tmp_path / "checkpoints"
    CheckpointSaver(folder).close()
    imports = "from castalia.checkpoint.formats.native.save import in_use"
    ask = f"{imports}\nwhile True: in_use({str(folder)!r})"
    with subprocess.Popen([sys.executable, "-c", ask]) as asking:
        time.sleep(1)
        for _ in range(50):
            CheckpointSaver(folder).close()
        assert asking.poll() is None
        asking.kill()


def test_all_runs_below_a_folder_are_found(straight, tmp_path):
    for name in ("a", "deep/b"):
        shutil.copytree(straight, tmp_path / name)
    assert find_runs(tmp_path) == [tmp_path / "a", tmp_path / "deep" / "b"]
    assert find_runs(tmp_path / "a") == [tmp_path / "a"]
    with pytest.raises(DataError, match="holds no run, and none lies below it"):
        find_runs(tmp_path / "a" / "checkpoints")


@pytest.mark.parametrize("size", [1, 20, 5000])
def test_the_last_records_are_the_end_of_all(tmp_path, size):
    records = [{"step": step, "note": "x" * (step % 200)} for step in range(size)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 99')  # a killed process
    assert read_last_metrics(tmp_path, 7) == records[-7:]
