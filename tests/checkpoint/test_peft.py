"""Adapters in PEFT's layout: the library computes the same with ours on the converted model, and we with its."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from castalia.checkpoint import convert
from castalia.checkpoint.file_plan import WriteOptions
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.tensors import Checkpoint, CheckpointFacts
from castalia.config.schema import FinetuneConfig, LoraConfig, ModelConfig
from castalia.config.tensor_table import adapter_shapes
from castalia.errors import CheckpointError
from castalia.language_model import load_model
from castalia.loading import build_model
from castalia.model.lora import add_adapters
from castalia.model.transformer import Transformer
from castalia.storage.lazy import InMemory
from tests.checkpoint.made import FAMILIES, QWEN2_MOE, SIZES, made, written

TOKENS = torch.arange(40).view(2, 20) % 90
ALL = {
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "embed_out"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
}


def adapted(model: ModelConfig, lora: LoraConfig, base: Path) -> Checkpoint:
    """A random model, which is also in the folder `base`, with random adapters."""
    draw = torch.Generator().manual_seed(5)
    source = made(model, optimizer=False)
    tensors = {
        name: InMemory(torch.randn(*shape, generator=draw) * 0.2) for name, shape in adapter_shapes(model, lora).items()
    }
    assert source.config is not None
    config = source.config.model_copy(update={"finetune": FinetuneConfig(lora=lora)})
    return replace(source, model={**source.model, **tensors}, config=config, facts=CheckpointFacts(base=str(base)))


def hugging_face(folder: Path, model: ModelConfig) -> Path:
    written(made(model, optimizer=False), folder, "hf")
    return folder


def with_peft(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, str(adapter)).eval()(TOKENS).logits


def made_by_peft(base: Path, folder: Path, **settings: object) -> torch.Tensor:
    """Saves adapters with random values; gives PEFT's own logits."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings))
    for name, parameter in wrapped.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1
    wrapped.save_pretrained(folder)
    with torch.no_grad():
        return wrapped.eval()(TOKENS).logits


HEAD = ("attn.qkv", "head")
MODELS = FAMILIES | {"qwen2_moe": QWEN2_MOE}


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        *[
            (kind, LoraConfig(rank=3, alpha=5.0))
            for kind in ("gpt_neox", "gpt2 untied", "llama with biases", "mistral", "qwen2_moe")
        ],
        *[(kind, LoraConfig(rank=3, alpha=5.0, targets=HEAD)) for kind in ("gpt_neox", "llama")],
    ],
)
def test_peft_computes_the_same_with_our_adapters(kind: str, lora: LoraConfig, tmp_path: Path) -> None:
    base = hugging_face(tmp_path / "base", MODELS[kind])
    source = adapted(MODELS[kind], lora, base)
    again = written(source, tmp_path / "adapter", "peft")
    ours = Transformer(MODELS[kind])
    add_adapters(ours, lora)
    ours.load_state_dict({name: ref.read() for name, ref in source.model.items()})
    with torch.no_grad():
        expected = ours.eval()(TOKENS)
    assert torch.allclose(with_peft(base, tmp_path / "adapter"), expected, atol=2e-5)
    with torch.no_grad():
        assert torch.allclose(build_model(again)(TOKENS), expected, atol=2e-5)
        plain = load_model(base)(TOKENS)
    assert (plain - expected).abs().max() > 0.1


@pytest.mark.parametrize("targets", [("attn.out",), ("mlp.down", "head"), ("mlp.up", "attn.qkv")])
def test_peft_adapts_the_matrices_that_were_meant(targets: tuple, tmp_path: Path) -> None:
    """GPT-2 has two modules of one name, c_proj."""
    base = hugging_face(tmp_path / "base", FAMILIES["gpt2 untied"])
    source = adapted(FAMILIES["gpt2 untied"], LoraConfig(rank=2, targets=targets), base)
    with torch.no_grad():
        expected = build_model(written(source, tmp_path / "adapter", "peft"))(TOKENS)
    assert torch.allclose(with_peft(base, tmp_path / "adapter"), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt_neox", {"r": 4, "target_modules": ALL["gpt_neox"], "lora_alpha": 6}),
        ("gpt_neox", {"r": 4, "target_modules": ["query_key_value"], "layers_to_transform": [1]}),
        ("gpt_neox", {"r": 2, "target_modules": ["dense", "lm_head"], "alpha_pattern": {"lm_head": 3}}),
        ("gpt_neox", {"r": 2, "target_modules": ["dense"], "modules_to_save": ["lm_head", "embed_in"]}),
        ("gpt2 untied", {"r": 2, "target_modules": ALL["gpt2"]}),
        ("llama", {"r": 3, "target_modules": ALL["llama"]}),
        ("llama", {"r": 3, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
        ("llama", {"r": 3, "target_modules": ["o_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
        (
            "mistral",
            {"r": 2, "target_modules": ALL["llama"][:6], "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"o_proj": 1}},
        ),
    ],
    ids=[
        "neox",
        "neox one layer",
        "neox head",
        "neox vocabulary",
        "gpt2",
        "llama",
        "rslora on q and v",
        "vocabulary",
        "patterns",
    ],
)
def test_adapters_made_by_peft_compute_the_same_here(kind: str, settings: dict, tmp_path: Path) -> None:
    base = hugging_face(tmp_path / "base", FAMILIES[kind])
    expected = made_by_peft(base, tmp_path / "adapter", **settings)
    with torch.no_grad():
        found = load_model(tmp_path / "adapter")(TOKENS)  # adapter_config.json names the model
    assert torch.allclose(found, expected, atol=2e-5)
    unmerged = open_checkpoint(tmp_path / "adapter", adapters=True)
    again = written(unmerged, tmp_path / "again", "peft")
    with torch.no_grad():
        assert torch.allclose(build_model(again)(TOKENS), expected, atol=2e-5)
    assert torch.allclose(with_peft(base, tmp_path / "again"), expected, atol=2e-5)


@pytest.mark.parametrize("settings", [{"target_modules": ["dense", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_the_head_of_gpt_neox_has_two_names(settings: dict, tmp_path: Path) -> None:
    """Before transformers 5 it was embed_out, in both files."""
    base = hugging_face(tmp_path / "base", FAMILIES["gpt_neox"])
    settings = {"target_modules": ["dense"], "r": 2, **settings}
    expected = made_by_peft(base, tmp_path / "adapter", **settings)
    config, file = tmp_path / "adapter" / "adapter_config.json", tmp_path / "adapter" / "adapter_model.safetensors"
    config.write_text(config.read_text().replace("lm_head", "embed_out"))
    tensors = {name.replace("lm_head", "embed_out"): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    assert any("embed_out" in name for name in tensors)
    source = open_checkpoint(tmp_path / "adapter", adapters=True)
    with torch.no_grad():
        assert torch.allclose(load_model(tmp_path / "adapter")(TOKENS), expected, atol=2e-5)
    plan = convert.plan_files("peft", source, WriteOptions())
    assert any("the head is called lm_head, as transformers 5 does" in note for note in plan.notes)


@pytest.fixture(scope="module")
def neox(tmp_path_factory) -> Path:
    """A model and an adapter of it by PEFT."""
    folder = tmp_path_factory.mktemp("neox")
    hugging_face(folder / "base", FAMILIES["gpt_neox"])
    made_by_peft(folder / "base", folder / "adapter", r=2, target_modules=["query_key_value"])
    return folder


def changed(source: Path, target: Path, **settings: object) -> Path:
    """A copy of the adapter with other settings."""
    target.mkdir()
    config = json.loads((source / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | settings))
    (target / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    return target


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora=True .DoRA's magnitudes. cannot be read"),
        ({"peft_type": "IA3"}, "peft_type='IA3' cannot be read"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "changed the model's own weights"),
        ({"base_model_name_or_path": None}, "does not say which model .*--base"),
        ({"base_model_name_or_path": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(settings: dict, words: str, neox: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(changed(neox / "adapter", tmp_path / "other", **settings))


@pytest.mark.parametrize(
    "other", [FAMILIES["gpt_neox"].model_copy(update={"hidden_size": 48}), FAMILIES["llama"]], ids=["width", "family"]
)
def test_an_adapter_of_another_model_is_one_clear_error(other: ModelConfig, neox: Path, tmp_path: Path) -> None:
    base = hugging_face(tmp_path / "base", other)
    with pytest.raises(CheckpointError, match=r"is an adapter of another model than .*base: it has A \[2, 32\], B"):
        open_checkpoint(neox / "adapter", base=str(base))


def test_a_layer_too_many_is_an_adapter_of_another_model(neox: Path, tmp_path: Path) -> None:
    deeper = changed(neox / "adapter", tmp_path / "deeper")
    tensors = load_file(deeper / "adapter_model.safetensors")
    more = {name.replace(".layers.1.", ".layers.7."): tensor for name, tensor in tensors.items()}
    save_file(more, deeper / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.7\.attention\.query_key_value.*no such matrix"):
        open_checkpoint(deeper)


def test_other_tensors_are_refused_by_name(neox: Path, tmp_path: Path) -> None:
    other = changed(neox / "adapter", tmp_path / "other")
    tensors = load_file(other / "adapter_model.safetensors")
    name = "base_model.model.gpt_neox.final_layer_norm.weight"
    save_file({**tensors, name: torch.ones(32)}, other / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"gpt_neox\.final_layer_norm\.weight is not a matrix of a LoRA adapter"):
        open_checkpoint(other)
    save_file(
        {**tensors, "base_model.model.gpt_neox.embed_in.weight": torch.ones(97, 32)},
        other / "adapter_model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"shape \[97, 32\].*the vocabulary was changed"):
        open_checkpoint(other)


def test_whole_models_have_no_adapters_to_write() -> None:
    from castalia.checkpoint.file_plan import WriteOptions
    from castalia.checkpoint.formats.peft.write import plan

    with pytest.raises(CheckpointError, match="has no adapters; for a whole model use --to hf"):
        plan(made(ModelConfig(**SIZES)), WriteOptions())
