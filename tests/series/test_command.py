from __future__ import annotations

import json
import sys

import pytest

from castalia.cli.main import main


def test_series_verbs_without_names_of_files(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = str(trained())
    capsys.readouterr()  # what training said

    def said(*words):
        monkeypatch.setattr(sys, "argv", ["castalia", *words])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        return capsys.readouterr().out

    assert json.loads(said("series", "check", run, "--steps", "2..8", "--json", "--plot"))["fine"]
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "the light was good"}\n')
    words = ["series", "eval", run, "--file", str(texts), "--steps", "0,8"]
    table = json.loads(said(*words, "--plot", "--json"))["table"]
    assert [row["step"] for row in table] == [0, 8]
    shown = said(*words)
    assert all(f"{row['loss']:.4f}" in shown for row in table)
    assert sorted(tmp_path.glob("*.*")) == [
        tmp_path / f for f in ("series-check.png", "series-eval.png", "texts.jsonl")
    ]
    assert not [*tmp_path.rglob("castalia/series/*")], "a journal is left"
