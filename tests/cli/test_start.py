"""From a folder of text to a run that goes on when it is stopped, and whose config makes the same run again."""

import json
from pathlib import Path

import pytest

from castalia.cli import main as cli
from castalia.observe.metrics import read_metrics
from castalia.quickstart import measure

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["model.num_layers=1", "model.hidden_size=32", "model.mlp_size=64", "data.seq_length=64", "train.steps=8"]
SMALL += ["train.batch_size=2", "train.micro_batch_size=2", "eval.every=4", "eval.batches=1"]


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["castalia", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "TRIAL_SECONDS", 0.0)
    monkeypatch.setattr(measure, "TRIALS", {"cpu": ((1, 32), (1, 64))})
    lines = (ROOT / "examples/kjv/kjv.jsonl").read_text().splitlines()[:8]
    Path("mine").mkdir()
    Path("mine/a.txt").write_text("\n".join(json.loads(line)["text"] for line in lines))
    Path("mine/b.png").write_bytes(b"\x00")
    return Path("mine")


def losses(folder):
    return {record["step"]: record["loss"] for record in read_metrics(Path(folder))}


def test_a_dry_run_says_the_plan_and_writes_nothing(folder, monkeypatch, capsys):
    assert not run(monkeypatch, "start", folder, "--hours", "0.1", "--dry-run")
    out = capsys.readouterr().out
    for word in ("1 .txt", "1 .png", "parameters", "tokens/s", "bits for each byte", "twice the time", "passes over"):
        assert word in out
    assert max(map(len, out.splitlines())) <= 100
    assert not run(monkeypatch, "start", folder, "--hours", "0.1", "--dry-run", "--json")
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["choice"]["parameters"] > 0 and plan["twice_the_time"]["tokens"] >= plan["choice"]["tokens"]
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["mine"]


def test_a_run_goes_on_by_the_same_command_and_its_config_makes_it_again(folder, monkeypatch, capsys):
    command = ["start", folder, "--hours", "0.1", *SMALL, "train.exit_interval=4"]
    assert not run(monkeypatch, *command)
    assert set(losses("runs/mine")) == {1, 2, 3, 4}
    config = Path("runs/mine/start.yml").read_text()
    assert "as you asked" in config
    assert not run(monkeypatch, *command)
    out = capsys.readouterr().out
    assert "continuing runs/mine" in out and "where" in out.splitlines()[-2]
    assert Path("runs/mine/start.yml").read_text() == config
    assert "<html" in Path("runs/mine/report.html").read_text()[:200]
    assert len([*Path("runs/mine/data").glob("train_*_doc_idx.npy")]) == 1  # measuring leaves no index of its own
    assert not run(
        monkeypatch, "train", "runs/mine/start.yml", "checkpoint.dir=again", "train.exit_interval=null", "--json"
    )
    assert losses("again") == losses("runs/mine") and len(losses("again")) == 8
    status = json.loads(capsys.readouterr().out)
    assert (status["folder"], status["state"], status["step"]) == ("again", "complete", 8)
    assert not run(monkeypatch, *command, "--json")  # complete: the report once more
    told = json.loads(capsys.readouterr().out)
    assert (told["run"], told["report"]["step"], told["plan"]["asked"]["hours"]) == ("runs/mine", 8, 0.1)
    assert losses("again") == losses("runs/mine")


def test_another_command_does_not_touch_the_run(folder, monkeypatch, capsys):
    assert not run(monkeypatch, "start", folder, *SMALL)
    capsys.readouterr()
    assert run(monkeypatch, "start", folder, *SMALL, "seed=7") == 2
    assert "begun by another command (words" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["mine", "--size", "many"], "--size many"),
        (["mine", "--size", "5M", "--hours", "1"], "exclude each other"),
        (["mine", "train.step=3"], "train.step"),
    ],
)
def test_mistakes_are_told_in_a_line(folder, monkeypatch, capsys, words, message):
    assert run(monkeypatch, "start", *words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in line
    assert not Path("runs").exists()
