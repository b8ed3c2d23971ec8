"""Every verb that computes with a checkpoint says what was guessed about it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import castalia
from castalia.cli import main as cli
from castalia.config.schema import ModelConfig
from castalia.data.tokenizer import ByteTokenizer
from tests.checkpoint.neox_writer import write

MODEL = ModelConfig(
    num_layers=1, hidden_size=16, num_heads=2, vocab_size=257, vocab_multiple=1, max_positions=32, mlp_size=64
)


@pytest.mark.parametrize(
    "words",
    [
        ["replay", "run", "--step", "2"],
        ["generate", "model", "--prompt", "In", "--max-tokens", "2", "--tokenizer", "tokenizer"],
        ["eval", "model", "--data", "text.txt", "--tokenizer", "tokenizer", "--json"],
        ["diff", "model", "model", "--json"],
        ["convert", "model", "out", "--to", "native"],
        ["lr-find", "run.yml", "checkpoint.init_from=model", "--steps", "40", "--lowest", "1e-4", "--json"],
        ["train", "run.yml", "checkpoint.init_from=model", "checkpoint.dir=run"],
    ],
    ids=lambda words: words[0],
)
def test_settings_that_are_guesses_are_noted(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write(tmp_path / "model", MODEL, kind="none", yml=False)
    ByteTokenizer("bytes").save(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("In the beginning God created the heaven and the earth. " * 40)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["castalia", "data", "prepare", "text.txt", "--output", "corpus"])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--tokenizer", "tokenizer"])
    assert exit_code() == 0, capsys.readouterr()
    (tmp_path / "run.yml").write_text(
        "data: {path: corpus_text_document, seq_length: 16}\ntokenizer: {path: tokenizer}\n"
        "train: {steps: 4, batch_size: 2, device: cpu}\noptimizer: {lr: 1.0e-3}\n"
    )
    if words[0] == "replay":
        train = ["castalia", "train", "run.yml", "checkpoint.init_from=model", "checkpoint.dir=run"]
        monkeypatch.setattr(sys, "argv", train)
        assert exit_code() == 0, capsys.readouterr()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["castalia", *words])
    code = exit_code()
    out, err = capsys.readouterr()
    said = " ".join((out + err).split())
    assert "parallel_residual=True" in said and "are guesses" in said, out + err
    if "--json" in words and not code:
        assert isinstance(json.loads(out), dict)


def test_the_library_warns_of_guesses(tmp_path: Path) -> None:
    write(tmp_path / "model", MODEL, kind="none", yml=False)
    with pytest.warns(UserWarning, match="parallel_residual=True.*are guesses"):
        castalia.load_model(tmp_path / "model")


def exit_code() -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0
