"""Opening a checkpoint: its tensors are those of its architecture, or it is said."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from castalia.checkpoint import convert
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import load_optimizer
from castalia.checkpoint.tensors import Progress
from castalia.config.load import load_config
from castalia.config.schema import TokenizerConfig
from castalia.data.chat import read_template
from castalia.data.dataset_writer import DatasetWriter
from castalia.data.indexed import open_dataset
from castalia.data.sources import documents
from castalia.data.tokenizer import load_tokenizer
from castalia.errors import CastaliaError, CheckpointError
from castalia.examine.inspect import report
from castalia.language_model import load_model
from castalia.storage.torch_file import open_pt
from tests.checkpoint.made import FAMILIES, made, written
from tests.checkpoint.neox_writer import config_yml, write
from tests.checkpoint.test_neox import MODELS

TOKENS = torch.arange(40).view(2, 20) % 90
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


@settings(max_examples=12)
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


def test_a_head_tells_how_many_blocks_there_were(tmp_path: Path) -> None:
    source = write(tmp_path / "a", MODELS["parallel"], kind="none", yml=False).path
    for name in ("layer_04-model_00-model_states.pt", "layer_06-model_00-model_states.pt"):  # the last block, the norm
        (source / name).unlink()
    with pytest.raises(CheckpointError, match="lacks 2 of .* files: layer_04-.*, layer_06-") as caught:
        open_checkpoint(source)
    assert "layer_05" not in str(caught.value)


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
    with pytest.raises(
        CheckpointError, match="7.final_linear.weight, is in no file: layer_07-model_00-model_states.*Copy it"
    ):
        open_checkpoint(source)
    source = write(tmp_path / "state", MODELS["parallel"], kind="zero", dtype=torch.float16).path
    (source / "layer_07-model_00-model_states.pt").unlink()
    for file in source.glob("mp_rank*"):
        torch.save(torch.load(file, weights_only=False) | {"param_shapes": None}, file)
    seen = open_checkpoint(source, tolerant=True)
    assert any("layer_07-model_00-model_states.pt is missing" in line for line in seen.facts.disagreements)


def folder_of(kind: str, folder: Path, **changes: object) -> dict[str, torch.Tensor]:
    """A converted model without an optimizer, its config.json changed; gives its tensors."""
    written(made(FAMILIES[kind], optimizer=False), folder, "hf")
    (folder / "castalia.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return load_file(folder / "model.safetensors")


def assert_as_transformers(folder: Path, tokens: torch.Tensor = TOKENS) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        assert torch.allclose(load_model(folder)(tokens), model.eval()(tokens).logits, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2 untied", "llama"])
def test_another_head_than_the_embedding_is_used_whatever_the_config_says(kind: str, tmp_path: Path) -> None:
    folder_of(kind, tmp_path / "a", tie_word_embeddings=True)
    checkpoint = open_checkpoint(tmp_path / "a")
    assert not checkpoint.config.model.tie_embeddings and "is used, as transformers" in checkpoint.notes[0]
    assert_as_transformers(tmp_path / "a")
    again = written(checkpoint, tmp_path / "again", "hf")
    assert not again.config.model.tie_embeddings and not again.notes


@pytest.mark.parametrize("kind, head", [("gpt_neox sequential tied", "embed_out.weight"), ("gpt2", "lm_head.weight")])
def test_a_tied_model_may_store_its_head_alone_or_both(kind: str, head: str, tmp_path: Path) -> None:
    tensors = folder_of(kind, tmp_path / "a")
    (embedding,) = (name for name in tensors if name.endswith(("embed_in.weight", "wte.weight")))
    save_file(tensors | {head: tensors[embedding].clone()}, tmp_path / "a" / "model.safetensors")
    both = open_checkpoint(tmp_path / "a")
    assert both.config.model.tie_embeddings and not both.notes
    tensors[head] = tensors.pop(embedding)
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "a")
    assert f"only {head} is stored" in checkpoint.notes[0]
    assert_as_transformers(tmp_path / "a")


def test_keys_of_a_related_class_are_ignored_as_its_own_class_does(tmp_path: Path) -> None:
    folder_of("llama", tmp_path / "llama", sliding_window=3)
    checkpoint = open_checkpoint(tmp_path / "llama")
    assert checkpoint.config.model.sliding_window is None
    assert "sliding_window=3 of config.json means nothing that we know of in a llama model" in checkpoint.notes[0]
    assert_as_transformers(tmp_path / "llama")
    written(checkpoint, tmp_path / "again", "hf")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "llama"
    folder_of("mistral", tmp_path / "mistral", attention_bias=True, mlp_bias=True)
    assert "attention_bias=True, mlp_bias=True" in open_checkpoint(tmp_path / "mistral").notes[0]
    assert_as_transformers(tmp_path / "mistral")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("marked", [True, False])
def test_a_state_of_weights_that_were_trained_on_elsewhere_is_not_theirs(
    dtype: torch.dtype, marked: bool, tmp_path: Path
) -> None:
    """Folders of earlier conversions have no fingerprint: there the masters tell, where there are any."""
    source = written(made(FAMILIES["gpt_neox"], dtype=dtype), tmp_path / "a", "hf")
    assert source.optimizer is not None and not source.state_notes
    beside = json.loads((tmp_path / "a" / "castalia.json").read_text())
    if not marked:
        del beside["fingerprint"]
        (tmp_path / "a" / "castalia.json").write_text(json.dumps(beside))
        assert open_checkpoint(tmp_path / "a").optimizer is not None
    file = tmp_path / "a" / "model.safetensors"
    tensors = {name: tensor * 1.5 for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    changed = open_checkpoint(tmp_path / "a")
    if not marked and dtype == torch.float32:
        return
    assert changed.optimizer is None and changed.progress == Progress()
    assert "changed after castalia.json" in changed.state_notes[0]
    cast = convert.prepare(changed, torch.float32)
    assert torch.equal(cast.model["embed.weight"].read(), tensors["gpt_neox.embed_in.weight"].float())
    optimizer = torch.optim.AdamW([torch.zeros(1)])
    with pytest.raises(CheckpointError, match="cannot be resumed .*changed after castalia.json"):
        load_optimizer(optimizer, {}, changed)


def test_a_state_whose_file_was_removed_is_said_to_be_missing(tmp_path: Path) -> None:
    written(made(FAMILIES["gpt_neox"]), tmp_path / "a", "hf")
    (tmp_path / "a" / "optimizer.safetensors").unlink()
    checkpoint = open_checkpoint(tmp_path / "a")
    assert checkpoint.optimizer is None and checkpoint.progress.step == 9
    assert "optimizer.safetensors, the optimizer state that castalia.json belongs to, is" in checkpoint.state_notes[0]


def test_weights_of_deepspeed_that_are_not_the_masters_rounded_win(tmp_path: Path) -> None:
    source = write(tmp_path / "a", MODELS["parallel"], tp=2, dp=2, kind="zero", dtype=torch.float16).path
    assert not open_checkpoint(source).notes
    for file in source.glob("layer_03*"):
        torch.save({name: tensor * 2 for name, tensor in torch.load(file).items()}, file)
    checkpoint = open_checkpoint(source)
    assert "3.attention.dense.bias is the first" in checkpoint.notes[0] and "12 of 40" in checkpoint.notes[0]
    name = "blocks.1.mlp.up.weight"
    cast = convert.prepare(checkpoint, torch.float32).model[name]
    assert torch.equal(cast.read(), checkpoint.model[name].read().float())


def test_a_folder_of_the_trainer_with_deepspeed_is_a_hugging_face_model(tmp_path: Path) -> None:
    folder_of("llama", tmp_path / "a")
    (tmp_path / "a" / "latest").write_text("global_step500")
    parts = tmp_path / "a" / "global_step500"
    parts.mkdir()
    torch.save({"module": {}, "param_shapes": [{"model.norm.weight": (32,)}]}, parts / "mp_rank_00_model_states.pt")
    assert open_checkpoint(tmp_path / "a").format == "huggingface"
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights: .*global_step500.*zero_to_fp32.py"):
        open_checkpoint(tmp_path / "a")


def test_adapters_open_beside_a_config_or_beside_their_whole_model(tmp_path: Path) -> None:
    written(made(FAMILIES["llama"], optimizer=False), tmp_path / "base", "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["o_proj"])
    adapted = peft.get_peft_model(model, settings).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(TOKENS).logits
        assert torch.allclose(load_model(tmp_path / "adapter")(TOKENS), expected, atol=1e-4)
        shutil.copytree(tmp_path / "base", tmp_path / "adapter", dirs_exist_ok=True)
        config = tmp_path / "adapter" / "adapter_config.json"
        named = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "adapter")}
        config.write_text(json.dumps(named))
        assert torch.allclose(load_model(tmp_path / "adapter")(TOKENS), expected, atol=1e-4)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    assert open_checkpoint(tmp_path / "adapter").config.finetune.lora is None


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "castalia.json", "model.safetensors.index.json"])
def test_pointers_of_git_lfs_are_said_to_be_such(name: str, tmp_path: Path) -> None:
    folder_of("gpt2", tmp_path / "a")
    if "index" in name:
        (tmp_path / "a" / "model.safetensors").unlink()
    (tmp_path / "a" / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        open_checkpoint(tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("a.idx", lambda folder: open_dataset(folder / "a")),
        ("a.bin", lambda folder: open_dataset(folder / "a")),
        ("tokenizer.json", lambda folder: load_tokenizer(TokenizerConfig(path=str(folder)))),
        ("tokenizer_kind.json", lambda folder: load_tokenizer(TokenizerConfig(path=str(folder)))),
        ("tokenizer.model", lambda folder: load_tokenizer(TokenizerConfig(path=str(folder / "tokenizer.model")))),
        ("chat.jinja", lambda folder: read_template(folder / "chat.jinja")),
        ("text.txt", lambda folder: list(documents([folder / "text.txt"]))),
        ("records.jsonl.gz", lambda folder: list(documents([folder / "records.jsonl.gz"]))),
        ("run.yml", lambda folder: load_config(folder / "run.yml")),
        ("pytorch_model.bin", lambda folder: open_pt(folder / "pytorch_model.bin")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pointers_are_said_to_be_such_wherever_files_are_read(
    name: str, read: Callable[[Path], object], tmp_path: Path
) -> None:
    if name.startswith("a."):
        with DatasetWriter(tmp_path / "a", np.uint16) as writer:
            writer.add(np.arange(999))
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(CastaliaError, match=f"{name}.* a Git LFS pointer.*git lfs pull"):
        read(tmp_path)


def test_pointers_among_our_own_and_deepspeeds_files(tmp_path: Path) -> None:
    written(made(FAMILIES["gpt2"]), tmp_path / "native", "native")
    (tmp_path / "native" / "manifest.json").write_text(POINTER)
    with pytest.raises(CheckpointError, match="manifest.json is a Git LFS pointer"):
        open_checkpoint(tmp_path / "native")
    source = write(tmp_path / "a", MODELS["parallel"], kind="none").path
    (source / "layer_03-model_00-model_states.pt").write_text(POINTER)
    with pytest.raises(CheckpointError, match="layer_03-model_00-model_states.pt is a Git LFS pointer"):
        open_checkpoint(source)


def test_an_empty_latest_and_a_manifest_of_another_program_are_said_to_be_such(tmp_path: Path) -> None:
    write(tmp_path / "run" / "global_step9", MODELS["parallel"], kind="none")
    (tmp_path / "run" / "latest").write_text("\n")
    with pytest.raises(CheckpointError, match="latest is empty, .*there are global_step9"):
        open_checkpoint(tmp_path / "run")
    folder_of("gpt2", tmp_path / "a")
    for other in ('{"name": "an app", "version": 1}', "[]", '{"layers": []}'):
        (tmp_path / "a" / "manifest.json").write_text(other)
        assert open_checkpoint(tmp_path / "a").format == "huggingface"
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="its manifest.json is another program's"):
        open_checkpoint(tmp_path / "a")


def test_a_missing_part_of_zero_3_is_named(tmp_path: Path) -> None:
    """One file of model states tells everything; of the weights, each rank's file has a part."""
    layout = {"pipeline": False, "dp": 3, "kind": "stage3", "dtype": torch.float16}
    source = write(tmp_path / "a", MODELS["parallel"], **layout).path
    for rank in (0, 2):
        (source / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").unlink()
    open_checkpoint(source)
    for rank in (2, 0):
        (source / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").unlink()
        with pytest.raises(CheckpointError, match=f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt.*There are"):
            open_checkpoint(source)
    (source / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="ZeRO 3 keeps the weights in the optimizer files, which are missing"):
        open_checkpoint(source)


@pytest.mark.parametrize("what", RESHAPED)
@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "llama"])
def test_inspect_goes_on_and_lists_what_disagrees(kind: str, what: str, tmp_path: Path) -> None:
    tensors = folder_of(kind, tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    for name in (name for name in tensors if name.endswith(("embed_in.weight", "wte.weight", "mlp.down_proj.weight"))):
        odd = RESHAPED[what](tensors[name]).clone(memory_format=torch.contiguous_format)
        save_file(tensors | {name: odd}, file)
        found = report(open_checkpoint(tmp_path / "a", tolerant=True))
        assert any("has shape" in line for line in found["disagreements"])
