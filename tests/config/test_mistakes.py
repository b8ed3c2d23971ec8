"""Each mistake that a config can hold, as its user meets it: file, line, value, reason and a way out, exit code 2."""

from __future__ import annotations

import pytest

from castalia.cli.main import main
from castalia.config.load import load_config
from castalia.data.dataset_writer import DatasetWriter
from castalia.train.start_checks import find_obstacles

SOUND = """\
model: {num_layers: 1, hidden_size: 16, num_heads: 2}
tokenizer: {kind: bytes}
data: {path: words, seq_length: 8, split: "1, 0, 0"}
train: {steps: 1, batch_size: 2}
checkpoint: {dir: run}
"""

# What is appended to or replaced in the sound config, and what the one message must hold.
MISTAKES = {
    "unknown key": ("optimizer: {learning_rate: 0.1}\n", ["a.yml:6: unknown key optimizer.learning_rate", "lr"]),
    "misspelt key": ("log: {evry: 1}\n", ["a.yml:6: unknown key log.evry; did you mean log.every?"]),
    "wrong type": ("log: {every: often}\n", ["a.yml:6: log.every: 'often': is not a whole number"]),
    "impossible value": ("optimizer: {lr: -1}\n", ["a.yml:6: optimizer.lr: -1: is not greater than 0", "above 0"]),
    "too many shares": (
        (("1, 0, 0", "1, 2, 3, 4"),),
        ["a.yml:3: data.split: '1, 2, 3, 4': 4 parts; there are three: training, validation and test"],
    ),
    "shares that are no numbers": ((("1, 0, 0", "most"),), ["a.yml:3: data.split: 'most': no list of numbers such as"]),
    "impossible layout": (
        "parallel: {tp: 3}\n",
        ["a.yml:6, a.yml:1: parallel.tp=3 does not divide model.num_heads=2; use one of 1, 2"],
    ),
    "too many stages": ("parallel: {pp: 2}\n", ["a.yml:6, a.yml:1: parallel.pp=2 is more than model.num_layers=1"]),
    "devices that do not divide": (
        "parallel: {gpus: 3, tp: 2}\n",
        ["a.yml:6: parallel.gpus=3 does not divide by tp * pp * cp = 2 * 1 * 1; 2 would"],
    ),
    "batch that does not divide": (
        (("batch_size: 2", "batch_size: 3, micro_batch_size: 2"),),
        ["a.yml:4: train.batch_size=3 does not divide", "2 or 4 would fit"],
    ),
    "missing corpus": (
        (("path: words", "path: wrods"),),
        ["a.yml:3: data.path=wrods: wrods.bin and wrods.idx are missing", "castalia data prepare"],
    ),
    "missing index": (
        (("path: words", "path: torn"),),
        ["a.yml:3: data.path=torn: torn.idx is missing"],
    ),
    "missing tokenizer": (
        (("kind: bytes", "path: tokenizer.json"),),
        ["a.yml:2: tokenizer.path=tokenizer.json: there is no such file; give tokenizer.path=FILE"],
    ),
    "missing checkpoint": (
        (("dir: run", "dir: run, init_from: /nowhere/base"),),
        ["a.yml:5: checkpoint.init_from=/nowhere/base: there is no such folder", "leave checkpoint.init_from out"],
    ),
    "missing run": (
        (("dir: run", "dir: run, resume: /nowhere/run"),),
        ["a.yml:5: checkpoint.resume=/nowhere/run: there is no such folder", "leave it out for a new run"],
    ),
    "another tokenizer": (
        (("path: words", "path: foreign"),),
        ["a.yml:3: foreign holds the token id 9000", "vocabulary has 257 entries", "another tokenizer. Prepare it"],
    ),
    "no corpus": ((("path: words, ", ""),), ["no data: give data.path (one corpus, split) or data.train"]),
    "no end": ((("steps: 1, ", ""),), ["no end: give train.steps or train.epochs"]),
    "no batch": ((("steps: 1, batch_size: 2", "steps: 1"),), ["no batch: give train.batch_size"]),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, token in (("words", 7), ("foreign", 9000)):
        with DatasetWriter(name, "uint16") as writer:
            for _ in range(8):
                writer.add([token] * 16)
    (tmp_path / "torn.bin").write_bytes(b"\0\0")
    return tmp_path


def run(monkeypatch, capsys, *words):
    """Exit code and messages of a command line."""
    monkeypatch.setattr("sys.argv", ["castalia", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_has_its_message(here, monkeypatch, capsys, name):
    change, parts = MISTAKES[name]
    text = SOUND + change if isinstance(change, str) else SOUND
    for old, new in () if isinstance(change, str) else change:
        assert old in text
        text = text.replace(old, new)
    (here / "a.yml").write_text(text)
    code, said = run(monkeypatch, capsys, "train", "a.yml")
    assert code == 2
    for part in parts:
        assert part in said
    assert "Traceback" not in said
    assert not (here / "run").exists()


def test_the_sound_config_has_no_mistake(here, monkeypatch, capsys):
    (here / "a.yml").write_text(SOUND)
    assert find_obstacles(load_config("a.yml")) == []
    code, said = run(monkeypatch, capsys, "train", "a.yml", "--dry-run")
    assert code == 0, said


def test_a_checkpoint_of_another_architecture_is_refused_with_every_difference(here, monkeypatch, capsys):
    (here / "a.yml").write_text(SOUND)
    assert run(monkeypatch, capsys, "train", "a.yml")[0] == 0
    (here / "b.yml").write_text(
        "checkpoint: {init_from: run, dir: other}\nmodel:\n  num_layers: 2\n  hidden_size: 32\n  num_heads: 2\n"
        "  position: learned\n"
    )
    code, said = run(monkeypatch, capsys, "train", "a.yml", "b.yml")
    assert code == 2
    for part in (
        "run/checkpoints/step_000001 is another model than the config describes",
        "model.num_layers: 1 in the checkpoint, 2 in the config (b.yml:3, replacing a.yml:1)",
        "model.hidden_size: 16 in the checkpoint, 32 in the config (b.yml:4, replacing a.yml:1)",
        "model.position: rotary in the checkpoint, learned in the config (b.yml:6)",
        "Correct these values, or leave them out",
    ):
        assert part in said
    assert "num_heads" not in said
    assert not (here / "other").exists()


def test_all_that_is_missing_is_told_at_once(here, monkeypatch, capsys):
    (here / "a.yml").write_text(SOUND.replace("words", "gone").replace("kind: bytes", "path: none.json"))
    code, said = run(monkeypatch, capsys, "train", "a.yml", "checkpoint.init_from=nowhere", "checkpoint.dir=null")
    assert code == 2
    places = [line.removeprefix("error: ").partition(":")[0] for line in said.splitlines()]
    assert places == ["command line", "a.yml", "a.yml", "no folder"]
