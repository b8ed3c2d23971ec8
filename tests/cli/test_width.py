"""No verb prints a line of more than 100 columns, unless a path is that long."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from castalia.cli import main as cli
from castalia.data.dataset_writer import DatasetWriter
from castalia.wrapping import WIDTH

RUN = """\
model: {num_layers: 2, hidden_size: 32, num_heads: 4}
data: {path: corpus, seq_length: 16, split: "80,20,0"}
tokenizer: {kind: bytes}
train: {steps: 2, batch_size: 8, micro_batch_size: 1}
eval: {every: 1, batches: 1}
checkpoint: {dir: runs/first, every: 1}
"""
NEOX = """\
{"num-layers": 2, "hidden-size": 32, "num-attention-heads": 4, "seq-length": 16, "train-iters": 20,
 "use_wandb": true, "log-grad-norm": true, "gradient_clipping": 1.0, "lr-decay-style": "cosine", "lr": 0.001}
"""
VERBS = [
    "train run.yml train.steps=3 checkpoint.dir=runs/second",
    "train run.yml --dry-run --verbose checkpoint.dir=runs/third",
    "plan run.yml",
    "plan neox.yml --vocab-size 257",
    "plan gpt-neox-20b --gpus 96xA100-40 --vocab-size 50257 --suggest",
    "plan gpt-neox-20b --gpus 8xH100 --vocab-size 50257",
    "inspect runs/first",
    "inspect runs/first --tensors",
    "doctor",
    "eval runs/first --by-source",
    "convert runs/first hf --to hf --verify",
    "convert runs/first series --to neox --all-steps",
    "diff runs/first runs/first --step-a 1 --step-b 2",
    "config check neox.yml",
    "config explain schedule.warmup",
    "config explain data.train",
    "status runs",
    "config show run.yml",
    "data batch run.yml data.seq_length=160 train.batch_size=2 train.micro_batch_size=2",
    "data inspect corpus",
    "data stats corpus",
    "replay runs/first --step 2",
    "lr-find run.yml --steps 20",
    "mup check run.yml --widths 32,64 --steps 2",
    "plot runs/first",
    "report runs/first",
    "launch slurm run.yml checkpoint.dir=runs/third --gpus-per-node 2",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, configs and a run."""
    place = tmp_path_factory.mktemp("width")
    with DatasetWriter(place / "corpus", "uint16") as writer:
        for number in range(40):
            writer.add([*b"and the evening and the morning were the first day "[number:], 256])
    (place / "run.yml").write_text(RUN)
    (place / "neox.yml").write_text(NEOX)
    return place


def said(line: str, monkeypatch, capsys) -> list[str]:
    monkeypatch.setattr("sys.argv", ["castalia", *shlex.split(line)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, errors = capsys.readouterr()
    assert not end.value.code, errors
    return [*out.splitlines(), *errors.splitlines()]


@pytest.mark.parametrize("line", VERBS, ids=lambda line: line.partition(" --")[0])
def test_lines_fit(folder, line, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    if not Path("runs/first").exists():
        said("train run.yml", monkeypatch, capsys)
    too_long = [text for text in said(line, monkeypatch, capsys) if len(text) > WIDTH]
    assert not too_long
