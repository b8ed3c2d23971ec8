"""Folders of GPT-NeoX, as they are: training goes on from them, batches and steps are looked at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from castalia.cli import data as data_verbs
from castalia.cli.finetune import command as finetune
from castalia.cli.train import read_config, train
from castalia.config.load import load_config
from castalia.errors import CheckpointError, ConfigError, TrainingError
from castalia.observe.metrics import read_metrics
from castalia.train.dry_run import rehearse
from castalia.train.start_checks import find_obstacles
from castalia.tune.replay import replay
from tests.data.test_cli import run


@pytest.fixture
def folder(fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A genuine checkpoint of step 5 with its data in the working directory, its tokenizer file beside the steps."""
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(fixtures / "neox" / "data")
    shutil.copytree(fixtures / "neox" / "pp1-mp1-dp2-z1-fp16-rotary-par" / "checkpoint", "model")
    shutil.copy(fixtures / "neox" / "data" / "tok.json", "model")
    return Path("model")


def test_training_goes_on_as_gpt_neox_went_on(folder: Path, fixtures: Path) -> None:
    config = read_config([str(folder), "neox_exact=true"])
    assert config.tokenizer.path == "model/tok.json"
    assert train(config) == "runs/model"
    recorded = json.loads((fixtures / "neox" / "pp1-mp1-dp2-z1-fp16-rotary-par" / "losses.json").read_text())
    losses = [record["loss"] for record in read_metrics(Path("runs/model"))]
    assert losses == pytest.approx(recorded["resumed_from_step_5_steps_6_to_10"], abs=2e-3)


@pytest.mark.parametrize(("exact", "warned"), [("neox_exact=false", True), ("neox_exact=true", False)])
def test_clipping_that_gpt_neox_left_off_is_told_of(folder: Path, capsys, exact: str, warned: bool) -> None:
    rehearse(read_config([str(folder), exact]))
    assert ("gradients are clipped to 1 from here on" in capsys.readouterr().out) == warned


def test_the_folder_of_one_step_will_do(folder: Path) -> None:
    config = read_config([str(folder / "global_step5"), "save=elsewhere"])
    assert config.checkpoint.dir == "elsewhere" and config.checkpoint.resume == "model/global_step5"


def test_a_batch_and_a_step_are_looked_at(folder: Path) -> None:
    shown = json.loads(run(data_verbs.app, "batch", str(folder), "--step", 6, "--json").stdout)
    assert shown["samples"][0]["position"] == 40  # after 5 steps of 8 sequences
    again = replay(folder, 6)
    assert again["checkpoint"] == 5 and again["recorded_loss"] is None
    assert again["loss"] == pytest.approx(4.5509, abs=2e-3)
    with pytest.raises(TrainingError, match=r"no checkpoint before step 5, only of steps 5"):
        replay(folder, 5)


def test_data_are_found_beside_the_folder_from_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path.cwd()
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    config = read_config(["../model"])
    assert {source.path for source in (*config.data.train, *config.data.valid)} == {
        str(home / "data" / "enwik8_text_document")
    }
    assert find_obstacles(config) == []
    assert config.checkpoint.dir == "runs/model"


def test_fine_tuning_without_the_tokenizer_says_which_option_names_it(folder: Path) -> None:
    (folder / "tok.json").unlink()
    Path("my.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(CheckpointError, match=r"names the tokenizer tok\.json, .* tokenizer\.path=FILE"):
        finetune(str(folder), ["my.jsonl", "train.steps=1"])
    assert not Path("runs").exists()


def test_a_folder_without_a_config_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configs/\*\.yml of GPT-NeoX.*checkpoint\.init_from="):
        load_config(tmp_path)
