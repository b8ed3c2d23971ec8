"""`castalia inspect` as a command: every way in which a checkpoint can be incomplete ends in one message and exit 2."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from castalia.cli import main as cli

TP2 = "pp1-mp2-z0-fp32-rotary-par"
ZERO = "pp1-mp1-dp2-z1-fp16-rotary-par"


@pytest.fixture
def castalia(monkeypatch, capsys):
    """Runs the command line; gives (exit code, stdout, stderr)."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["castalia", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return (stop.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def copy(fixtures, tmp_path):
    def make(name: str) -> Path:
        return Path(shutil.copytree(fixtures / "neox" / name / "checkpoint", tmp_path / name))

    return make


def remove(pattern: str):
    def do(folder: Path) -> None:
        removed = list(folder.glob(f"global_step5/{pattern}"))
        assert removed
        for path in removed:
            path.unlink()

    return do


def truncate(folder: Path) -> None:
    path = folder / "global_step5" / "layer_03-model_01-model_states.pt"
    path.write_bytes(path.read_bytes()[:1000])


def flip(folder: Path) -> None:
    path = folder / "global_step5" / "layer_03-model_01-model_states.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def point_elsewhere(folder: Path) -> None:
    (folder / "latest").write_text("global_step99")


def lead_out(folder: Path) -> None:
    (folder / "latest").write_text("../../elsewhere")


@pytest.mark.parametrize(
    ("variant", "harm", "found", "way_out"),
    [
        (
            TP2,
            remove("layer_03-*"),
            "files: layer_03-model_00-model_states.pt, layer_03-model_01",
            "Copy the missing files",
        ),
        (
            TP2,
            remove("layer_03-model_01*"),
            "files: layer_03-model_01-model_states.pt. There are",
            "Copy the missing files",
        ),
        (TP2, remove("*model_01*"), "lacks 5 of 12 files: layer_00-model_01-model_states.pt", "Copy the missing"),
        (TP2, remove("mp_rank_01*"), "lacks 1 of 12 files: mp_rank_01_model_states.pt", "Copy the missing"),
        (TP2, truncate, "layer_03-model_01-model_states.pt is truncated", "use another step"),
        (TP2, point_elsewhere, "names 'global_step99', but there is no such folder", "there are global_step5"),
        (TP2, lead_out, "'../../elsewhere', which is not a path inside this folder", "refused"),
        (
            ZERO,
            remove("zero_pp_rank_1*"),
            "files: zero_pp_rank_1_mp_rank_00_optim_states.pt",
            "weights alone",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 40 else "",
)
def test_what_is_missing_or_damaged_is_one_message(castalia, copy, variant, harm, found, way_out):
    folder = copy(variant)
    harm(folder)
    for verb in (["inspect", folder], ["generate", folder, "--prompt", "a"]):
        code, _, error = castalia(*verb)
        assert code == 2 and error.startswith("error: ") and "Traceback" not in error
        assert found in error and way_out in error


def test_a_flipped_bit_is_found_where_values_are_read(castalia, copy, fixtures):
    folder = copy(TP2)
    flip(folder)
    code, _, error = castalia("inspect", folder, "--tensors")
    assert code == 2 and "is damaged: bytes" in error and "Use another step, or a copy of this file" in error
    data = fixtures / "neox" / "data"
    code, _, error = castalia("eval", folder, "--data", data / "enwik8_text_document", "--tokenizer", data / "tok.json")
    assert code == 2 and "is damaged: bytes" in error


def test_a_foreign_config_is_refused_by_all_but_inspect(castalia, copy, fixtures):
    folder = copy(ZERO)
    shutil.copy(fixtures / "configs" / "20B.yml", folder / "global_step5" / "configs" / "config.yml")
    code, _, error = castalia("eval", folder)
    assert code == 2 and "num_layers: 2 in the tensors, 44 in the config" in error and "--config" in error
    code, said, _ = castalia("inspect", folder)
    assert code == 0 and "DISAGREEMENT: num_layers: 2 in the tensors, 44 in the config config.yml" in said


@pytest.mark.parametrize("variant", [TP2, ZERO, "v1-pp1-mp1-dp2-z1-fp16-rotary-par", "megds-pp1-mp1-dp2-z1-bf16"])
def test_it_is_said_in_words_and_in_json(castalia, fixtures, variant):
    folder = fixtures / "neox" / variant / "checkpoint"
    words = fixtures / "neox" / "data" / "tok.json"
    code, said, _ = castalia("inspect", folder, "--tokenizer", words)
    assert code == 0 and "x 48 model" in said and "430 of them used" in said and "no anomalies" in said
    assert "\x1b" not in said
    code, said, _ = castalia("inspect", folder, "--json", "--tensors")
    found = json.loads(said)
    assert code == 0 and len(found["tensors"]) >= 26 and found["path"].endswith("global_step5")
    assert found["sampled_values"] == found["parameters"]["total"]


def test_a_damaged_tokenizer_is_said_beside_all_the_rest(castalia, fixtures, tmp_path):
    shutil.copytree(fixtures / "neox" / TP2 / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"chat_template": ')
    shutil.copy(fixtures / "neox" / "data" / "tok.json", tmp_path / "hf" / "tokenizer.json")
    code, said, _ = castalia("inspect", tmp_path / "hf")
    assert code == 0 and "tokenizer_config.json is damaged" in " ".join(said.split()) and "parallel residual" in said


def test_hugging_face_folders_and_wrong_things(castalia, fixtures, tmp_path):
    code, said, _ = castalia("inspect", fixtures / "neox" / TP2 / "hf")
    assert code == 0 and "the weights alone" in said and "Hugging Face, gpt_neox" in said
    for path, reason in [
        (tmp_path, "does not look like a checkpoint: it is empty"),
        (tmp_path / "nothing", "does not exist"),
        (fixtures / "configs" / "20B.yml", "is a file; give the folder"),
    ]:
        code, _, error = castalia("inspect", path)
        assert code == 2 and reason in error
    code, _, error = castalia("inspect", fixtures / "neox" / TP2 / "checkpoint", "--tokenizer", tmp_path / "t.json")
    assert code == 2 and "no such file" in error
