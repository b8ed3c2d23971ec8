"""Opening a checkpoint from any path, in any format."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from castalia.checkpoint.formats import FORMATS, TARGETS
from castalia.checkpoint.opener import base_of, detect, open_checkpoint
from castalia.cli.convert import command
from castalia.errors import CheckpointError
from tests.checkpoint.made import FAMILIES, made, written
from tests.checkpoint.test_native import a_model, save


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_says_what_its_reader_takes(name: str) -> None:
    row = FORMATS[name]
    taken = set(inspect.signature(import_module(f"{row.package}.read").read).parameters) - {"path"}
    assert taken == set(row.hints) | ({"tolerant"} if row.tolerant else set()) | (
        {"open_base"} if row.on_base else set()
    )
    assert list(inspect.signature(import_module(f"{row.package}.write").plan).parameters) == ["checkpoint", "options"]


def test_convert_offers_every_format() -> None:
    offered = get_args(get_args(get_type_hints(command, include_extras=True)["to"])[0])
    assert set(offered) == TARGETS.keys()


@pytest.mark.parametrize(("name", "family"), [("native", "llama"), ("huggingface", "llama"), ("neox", "gpt_neox")])
def test_what_is_written_is_detected(name: str, family: str, tmp_path: Path) -> None:
    result = written(made(FAMILIES[family]), tmp_path / "out", FORMATS[name].target)
    assert detect(tmp_path / "out") == result.format == name
    assert base_of(result) is None and detect(tmp_path) is None


def test_latest_that_dangles_says_what_is_there(tmp_path: Path) -> None:
    save(tmp_path, 1, a_model())
    (tmp_path / "latest").write_text("step_000009")
    with pytest.raises(
        CheckpointError, match="names 'step_000009', but there is no such folder; there are step_000001"
    ):
        open_checkpoint(tmp_path)
    (tmp_path / "latest").write_text("../step_000001")
    with pytest.raises(CheckpointError, match="refused"):
        open_checkpoint(tmp_path)


def test_paths_to_a_checkpoint(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    save(checkpoints, 1, a_model(1))
    save(checkpoints, 2, a_model(2))
    assert open_checkpoint(tmp_path / "run").progress.step == 2
    assert open_checkpoint(tmp_path / "run", step=1).progress.step == 1
    with pytest.raises(CheckpointError, match="step_000001 is of step 1, not 2"):
        open_checkpoint(checkpoints / "step_000001", step=2)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; there are step_000001, step_000002"):
        open_checkpoint(checkpoints, step=7)
    (checkpoints / "latest").unlink()
    assert open_checkpoint(checkpoints).progress.step == 2  # the newest, as only whole ones have such a name
    with pytest.raises(CheckpointError, match="is a file"):
        open_checkpoint(checkpoints / "step_000001" / "manifest.json")
    with pytest.raises(CheckpointError, match="does not exist; beside it, there are step_000001"):
        open_checkpoint(checkpoints / "step_000005")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="does not look like a checkpoint: it is empty"):
        open_checkpoint(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="native checkpoint, for which gqa_rows has no meaning"):
        open_checkpoint(checkpoints / "step_000001", gqa_rows="old")
