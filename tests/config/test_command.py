"""The command `castalia config`, as users run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from castalia.cli.config import app
from castalia.config.load import load_config, preset_names
from castalia.errors import ConfigError

NEOX = '{"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seed": 7, "log_dir": "logs", "train_iters": 10}'


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("neox.yml").write_text(NEOX)

    def run(*words: str):
        result = CliRunner().invoke(app, list(words), catch_exceptions=True)
        if isinstance(result.exception, ConfigError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result

    return run


def test_show_marks_what_differs_and_names_origins(run):
    lines = run("show", "neox.yml", "train_iters=20").stdout.splitlines()
    assert [line.split(maxsplit=3) for line in lines if line.startswith("* train.steps")] == [
        ["*", "train.steps", "20", "command line, replacing neox.yml:1"]
    ]
    assert [line.split()[1:] for line in lines if " optimizer.eps " in line] == [["1e-08", "default"]]
    marks = [line[0] for line in lines]
    assert marks == sorted(marks, reverse=True)  # what differs comes first


def test_show_as_json(run):
    table = json.loads(run("show", "neox.yml", "--json").stdout)
    assert table["values"]["model.num_layers"] == {"value": 2, "origin": "neox.yml:1"}
    assert table["values"]["model.position"] == {"value": "learned", "origin": "NeoX default"}
    assert any("log_dir" in note for note in table["notes"])


def test_check_tells_a_program_what_it_found(run):
    found = json.loads(run("check", "neox.yml", "--json").stdout)
    assert found["accepted"] == ["neox.yml"] and found["notes"]
    assert {each["kind"] for each in found["obstacles"]} <= {"not given", "missing here", "in the way"}


def test_check_accepts_with_notes_and_refuses_with_2(run, tmp_path):
    result = run("check", "neox.yml")
    assert "accepted: neox.yml (" in result.stdout
    assert "note: neox.yml:1: log_dir: 'logs' has no effect here" in result.stderr
    refused = subprocess.run(
        [sys.executable, "-m", "castalia", "config", "check", "neox.yml", "seeed=1"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert refused.returncode == 2
    assert refused.stderr == "error: command line: unknown key seeed; did you mean seed?\n"


@pytest.mark.parametrize("name", ["neox.yml", *preset_names()])
def test_a_converted_config_is_equal(run, name):
    run("convert", name, "--output", "ours.yml")
    assert load_config("ours.yml") == load_config(name)
    assert "model:" in Path("ours.yml").read_text()
    with pytest.raises(ConfigError, match="exists already"):
        run("convert", name, "--output", "ours.yml")


def test_convert_writes_only_what_differs(run):
    text = run("convert", "neox.yml", "seed=1234").stdout
    assert "num_layers: 2" in text
    assert "seed" not in text
    assert "norm_eps" not in text


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("optimizer.lr", "optimizer.lr: a number above 0 (default 0.0003)"),
        ("gradient-clipping", "gradient_clipping (GPT-NeoX, default 1.0): becomes optimizer.clip_norm"),
        ("log_dir", "no effect here: metrics.jsonl"),
        ("dim_att", "dim_att (GPT-NeoX, default None): becomes the same as hidden_size"),
        ("gas", "a leftover of older releases"),
        ("save-interval", "save_interval (GPT-NeoX, formerly): now checkpoint_factor"),
        ("mlp_type", "refused unless it is off: `llama` became activation: swiglu"),
    ],
)
def test_explain(run, key, text):
    assert text in run("explain", key).stdout


def test_a_program_is_told_the_same_of_a_key(run):
    told = json.loads(run("explain", "gradient-clipping", "--json").stdout)
    (key,), (name,) = told["keys"], told["neox"]
    assert name == {
        "key": "gradient_clipping",
        "default": 1.0,
        "former": False,
        "kind": "joint",
        "target": "optimizer.clip_norm",
    }
    assert key["key"] == "optimizer.clip_norm" and key["neox"] == ["gradient_clipping", "clip_grad"]
    assert key["description"] in run("explain", "optimizer.clip_norm").stdout.replace("\n ", "")
    everything = json.loads(run("explain", "--all", "--json").stdout)
    assert key in everything["keys"] and name in everything["neox"]


def test_explain_suggests(run):
    with pytest.raises(ConfigError, match="did you mean optimizer.lr"):
        run("explain", "train.lr")


def test_configs_need_no_torch(run, tmp_path):
    code = "import sys, castalia.cli.config as c; c.read(['neox.yml']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
