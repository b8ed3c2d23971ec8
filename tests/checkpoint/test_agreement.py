"""Opening a checkpoint: its tensors are those of its architecture, or it is said."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from castalia.checkpoint.formats import open_checkpoint
from castalia.errors import CheckpointError
from tests.checkpoint.made import FAMILIES, made, written
from tests.checkpoint.neox_writer import config_yml, write
from tests.checkpoint.test_neox import MODELS

RESHAPED = {
    "a row less": lambda tensor: tensor[:-1],
    "a vector": lambda tensor: tensor.flatten() if tensor.dim() > 1 else tensor[None],
    "a column less": lambda tensor: tensor[..., :-1] if tensor.dim() > 1 else tensor[:-1],
    "a row more": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "transposed": lambda tensor: tensor.t() if len(set(tensor.shape)) > 1 else tensor[:-1],
    "a number": lambda tensor: tensor.flatten()[0],
}


def reshaped(tensors: dict[str, torch.Tensor], offset: int = 0) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Each tensor in turn in one of the shapes."""
    kinds = list(RESHAPED.values())
    for number, (name, tensor) in enumerate(tensors.items(), offset):
        change = kinds[number % len(kinds)] if "embeddings" not in name else RESHAPED["a column less"]
        yield name, tensors | {name: change(tensor).clone(memory_format=torch.contiguous_format)}


@pytest.mark.parametrize("kind", FAMILIES)
def test_whatever_tensor_of_a_hugging_face_folder_has_another_shape_is_named(kind: str, tmp_path: Path) -> None:
    written(made(FAMILIES[kind], optimizer=False), tmp_path / "a", "hf")
    file = tmp_path / "a" / "model.safetensors"
    for name, tensors in reshaped(load_file(file)):
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match="shape|rows") as caught:
            open_checkpoint(file.parent)
        assert str(file.parent) in str(caught.value), name


@pytest.mark.parametrize("kind", MODELS)
def test_whatever_tensor_of_a_neox_folder_has_another_shape_is_named(kind: str, tmp_path: Path) -> None:
    source = write(tmp_path / "a", MODELS[kind], kind="none").path
    for offset, file in enumerate(sorted(source.glob("layer_0[0236]*"))):
        layer = torch.load(file)
        for name, tensors in reshaped(layer, offset):
            torch.save(tensors, file)
            with pytest.raises(CheckpointError) as caught:
                open_checkpoint(source)
            assert str(source) in str(caught.value), name
        torch.save(layer, file)
    open_checkpoint(source)


LAYOUTS = [
    {"tp": 2, "pp": 2, "dp": 2, "kind": "zero", "dtype": torch.float16},
    {"tp": 2, "dp": 2, "kind": "old1", "era": "v1", "dtype": torch.float16},
    {"pp": 2, "dp": 3, "kind": "bf16", "dtype": torch.bfloat16},
    {"pipeline": False, "tp": 2, "dp": 2, "kind": "zero", "dtype": torch.float16},
    {"tp": 2, "pp": 2, "kind": "plain"},
    {"tp": 2, "kind": "none"},
]


@pytest.fixture(scope="module", params=range(len(LAYOUTS)))
def whole_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("whole") / "a", MODELS["parallel"], **LAYOUTS[request.param]).path


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_combination_of_missing_files_is_named(whole_folder: Path, data: st.DataObject) -> None:
    names = sorted(path.name for path in whole_folder.glob("*.pt"))
    kinds = {kind: {name for name in names if kind in name} for kind in ("layer_", "mp_rank_0", "optim_states")}
    kinds["mp_rank_0"] -= kinds["optim_states"]
    lost = {name for kind in data.draw(st.sets(st.sampled_from(sorted(kinds)), max_size=2)) for name in kinds[kind]}
    lost |= data.draw(st.sets(st.sampled_from(names), max_size=4))
    with TemporaryDirectory() as place:
        folder = Path(place) / "a"
        shutil.copytree(whole_folder, folder)
        for name in lost:
            (folder / name).unlink()
        weights_alone = lost in (set(), kinds["optim_states"])
        layers_alone = kinds["layer_"] and lost == kinds["mp_rank_0"] | kinds["optim_states"]
        if weights_alone or layers_alone:
            open_checkpoint(folder)
            return
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(folder)
    named = re.findall(r"\S+_states\.pt", str(caught.value).partition("There are")[0].replace(folder.as_posix(), ""))
    if len(lost) < len(names) and lost & kinds["layer_"] != kinds["layer_"]:
        assert named, str(caught.value)
    assert {name.rstrip(",.") for name in named if "*" not in name} <= lost, str(caught.value)


def test_a_head_whose_file_is_missing_is_no_tied_embedding(tmp_path: Path) -> None:
    """The optimizer's shapes list it. Without them nothing tells, and the guess is said."""
    for kind, dtype in {"zero": torch.float16, "bf16": torch.bfloat16, "old1": torch.float16}.items():
        era = "v1" if kind == "old1" else "head"
        layout = {"kind": kind, "dtype": dtype, "era": era, "dp": 2, "yml": False}
        source = write(tmp_path / kind, MODELS["parallel"], **layout).path
        (source / "layer_07-model_00-model_states.pt").unlink()
        with pytest.raises(CheckpointError, match="lacks 1 of .* files: layer_07-model_00-model_states.pt"):
            open_checkpoint(source)
    source = write(tmp_path / "none", MODELS["parallel"], kind="none", yml=False).path
    (source / "layer_07-model_00-model_states.pt").unlink()
    state = torch.load(source / "mp_rank_00_model_states.pt", weights_only=False)
    torch.save(state | {"param_shapes": None}, source / "mp_rank_00_model_states.pt")
    assert any("tie_embeddings=True" in note and "guesses" in note for note in open_checkpoint(source).notes)
    (source / "config.yml").write_text(config_yml(MODELS["parallel"]))
    with pytest.raises(CheckpointError, match="7.final_linear.weight, is in no file: layer_07-model_00-model_states"):
        open_checkpoint(source)
