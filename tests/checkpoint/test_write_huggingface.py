"""Written Hugging Face folders: `transformers` opens them unchanged and computes the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import load_tokenizer_for
from castalia.config.schema import ModelConfig, RopeScaling, TokenizerConfig
from castalia.data.tokenizer import train_bpe
from castalia.errors import CheckpointError
from castalia.language_model import load_model
from castalia.loading import build_model
from tests.checkpoint.made import FAMILIES, GLM4_MOE, LLAMA, MIXTRAL, QWEN2_MOE, SIZES, assert_same, made, written

TOKENS = torch.arange(40).view(2, 20) % 90
SCALINGS = {
    "linear": RopeScaling(kind="linear", factor=4.0),
    "llama3": RopeScaling(kind="llama3", factor=8.0, original_positions=24),
    "yarn": RopeScaling(kind="yarn", factor=4.0, original_positions=16),
}
MODELS = FAMILIES | {"mixtral": MIXTRAL, "qwen2_moe": QWEN2_MOE, "glm4_moe": GLM4_MOE}
MODELS |= {f"llama {kind}": ModelConfig(**SIZES, **LLAMA, rope_scaling=scaling) for kind, scaling in SCALINGS.items()}
TOLERANCES = {"fp32": 2e-6, "fp16": 4e-3, "bf16": 3e-2}


def opened(folder: Path) -> transformers.PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return opened(folder)(tokens).logits


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_computes_the_same(kind: str, tmp_path: Path) -> None:
    source = made(MODELS[kind], optimizer=False)
    written(source, tmp_path / "out", "hf")
    with torch.no_grad():
        expected = build_model(source)(TOKENS)
    assert torch.allclose(logits(tmp_path / "out", TOKENS), expected, atol=1e-5)


def test_every_genuine_checkpoint_gives_the_original_logits(fixtures: Path, tmp_path: Path) -> None:
    variants = sorted(path.parent for path in (fixtures / "neox").glob("*/checkpoint"))
    for variant in variants:
        written(open_checkpoint(variant / "checkpoint"), tmp_path / variant.name, "hf")
        known = np.load(variant / "expected_logits.npz")
        found = logits(tmp_path / variant.name, torch.from_numpy(known["input_ids"]))
        precision = next(part for part in variant.name.split("-") if part in TOLERANCES)
        error = float((found - torch.from_numpy(known["logits"])).abs().max())
        assert error < TOLERANCES[precision], (variant.name, error)


def test_upstream_conversions_have_the_same_tensors(fixtures: Path, tmp_path: Path) -> None:
    """Where the original's converter is right, our tensors are its tensors."""
    folders = sorted(path.parent for path in (fixtures / "neox").glob("*/hf"))
    assert len(folders) >= 6
    for folder in folders:
        written(open_checkpoint(folder / "checkpoint"), tmp_path / folder.name, "hf")
        ours = load_file(tmp_path / folder.name / "model.safetensors")
        theirs = {name: ref.read() for name, ref in open_checkpoint(folder / "hf").model.items()}
        again = {name: ref.read() for name, ref in open_checkpoint(tmp_path / folder.name).model.items()}
        assert theirs.keys() == again.keys()
        for name in theirs:
            rows = min(len(theirs[name]), len(again[name]))  # their vocabulary may be padded further
            assert torch.equal(theirs[name][:rows].to(again[name].dtype), again[name][:rows]), (folder.name, name)
        assert all(tensor.is_contiguous() for tensor in ours.values())


@pytest.mark.parametrize("variant", ["megds-pp1-mp1-z0-fp32", "megds-pp1-mp1-dp2-z1-bf16"])
def test_the_check_of_the_gpt2_model_cards_runs_verbatim(variant: str, fixtures: Path, tmp_path: Path) -> None:
    neox = fixtures / "neox"
    source = open_checkpoint(neox / variant / "checkpoint", tokenizer=str(neox / "data" / "tok.json"))
    written(source, tmp_path / "gpt2", "hf")
    mname = str(tmp_path / "gpt2")

    tokenizer = AutoTokenizer.from_pretrained(mname)
    tokenizer.add_special_tokens({"pad_token": tokenizer.eos_token})
    model = AutoModelForCausalLM.from_pretrained(mname)
    inputs = ["Hello, my dog is cute"]
    tokens = tokenizer(inputs, return_tensors="pt", padding=True)
    greedy = model.generate(**tokens, do_sample=False, max_new_tokens=5)
    outputs = tokenizer.batch_decode(greedy, skip_special_tokens=True)

    assert len(tokenizer) <= model.config.vocab_size
    assert len(outputs) == 1
    assert outputs[0].startswith("Hello, my dog is cute")
    assert model.config.eos_token_id == tokenizer.eos_token_id is not None
    ours = load_model(tmp_path / "gpt2")
    text = tokens["input_ids"]
    for _ in range(5):
        text = torch.cat([text, ours(text)[:, -1:].argmax(-1)], dim=1)
    if model.config.eos_token_id not in text[0, -5:]:
        assert text.tolist() == greedy.tolist()


def test_batches_are_padded_without_further_settings(fixtures: Path, tmp_path: Path) -> None:
    neox = fixtures / "neox"
    source = open_checkpoint(
        neox / "pp1-mp1-z0-fp32-rotary-par" / "checkpoint", tokenizer=str(neox / "data" / "tok.json")
    )
    written(source, tmp_path / "out", "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer(["Hello", "Hello, my dog is cute"], return_tensors="pt", padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].shape[0] == 2
    from castalia.checkpoint.restore import load_tokenizer_for

    ours = load_tokenizer_for(open_checkpoint(tmp_path / "out"))
    text = "A page, with 3 figures.\n\n [[Wiki]]"
    assert tokenizer(text)["input_ids"] == ours.encode(text)
    assert tokenizer.decode(ours.encode(text)) == text


def test_tokenizer_files_of_transformers_are_copied(fixtures: Path, tmp_path: Path) -> None:
    source = made(FAMILIES["gpt2"])
    saved = tmp_path / "words"
    saved.mkdir()
    shutil.copy(fixtures / "neox" / "data" / "tok.json", saved / "tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids"], "x": 1}
    (saved / "tokenizer_config.json").write_text(json.dumps(settings, indent=3))
    (saved / "chat_template.jinja").write_text("{{ messages }}")
    words = TokenizerConfig(path=str(saved / "tokenizer.json"))
    source = replace(source, config=source.config.model_copy(update={"tokenizer": words}))
    written(source, tmp_path / "out", "hf")
    for name in ("tokenizer_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (saved / name).read_bytes()


def test_a_tokenizer_json_is_copied_byte_for_byte(fixtures: Path, tmp_path: Path) -> None:
    given = tmp_path / "tok.json"  # spaced as no library of tokenizers writes it
    given.write_text(json.dumps(json.loads((fixtures / "neox" / "data" / "tok.json").read_text()), indent=5))
    source = made(FAMILIES["gpt2"], optimizer=False)
    config = source.config.model_copy(update={"tokenizer": TokenizerConfig(path=str(given))})
    written(replace(source, config=config), tmp_path / "out", "hf")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == given.read_bytes()


def words_folder(folder: Path, template: str = "{{ messages }}") -> dict[str, bytes]:
    """Tokenizer files, ids and generation defaults as a published chat model has them; all but config.json's."""
    tokenizer = train_bpe(["the cat sat on the mat"] * 20, 270)
    tokenizer.save(folder)
    contents = {
        "tokenizer_config.json": {"eos_token": "<|endoftext|>", "chat_template": template, "x": [1]},
        "special_tokens_map.json": {"eos_token": "<|endoftext|>"},
        "added_tokens.json": {"<x>": tokenizer.vocab_size},
        "generation_config.json": {"eos_token_id": [5, 0], "do_sample": True, "temperature": 0.6},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=3))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    names = (*contents, "tokenizer.json", "additional_chat_templates/rag.jinja")
    return {name: (folder / name).read_bytes() for name in names}


def with_ids(folder: Path, **ids: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in config.items() if not key.endswith("_token_id")}
    (folder / "config.json").write_text(json.dumps(kept | ids))


def token_ids(folder: Path) -> dict[str, object]:
    config = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in config.items() if key.endswith("_token_id")}


@pytest.mark.parametrize("way", [["hf"], ["native", "hf"], ["native", "native", "hf"]])
def test_converted_back_is_the_identity_for_words(tmp_path: Path, way: list[str]) -> None:
    """Each source is moved away before the next conversion."""
    ids = {"bos_token_id": 3, "eos_token_id": [4, 7], "pad_token_id": 9}
    written(made(FAMILIES["gpt_neox"], optimizer=False), tmp_path / "0", "hf")
    files = words_folder(tmp_path / "0")
    with_ids(tmp_path / "0", **ids)
    for number, form in enumerate(way):
        written(open_checkpoint(tmp_path / str(number)), tmp_path / str(number + 1), form)
        shutil.rmtree(tmp_path / str(number))
        ends = load_tokenizer_for(open_checkpoint(tmp_path / str(number + 1))).end_ids
        assert ends == {0, 4, 5, 7}
    last = tmp_path / str(len(way))
    assert token_ids(last) == ids
    assert {name: (last / name).read_bytes() for name in files} == files


def test_ids_survive_without_a_tokenizer(tmp_path: Path) -> None:
    written(made(FAMILIES["gpt_neox"], optimizer=False), tmp_path / "0", "hf")
    with_ids(tmp_path / "0", eos_token_id=7)
    (tmp_path / "0" / "generation_config.json").write_text('{"eos_token_id": 7}  ')
    for number, form in enumerate(["native", "hf"]):
        written(open_checkpoint(tmp_path / str(number)), tmp_path / str(number + 1), form)
        shutil.rmtree(tmp_path / str(number))
    assert token_ids(tmp_path / "2") == {"eos_token_id": 7}
    assert (tmp_path / "2" / "generation_config.json").read_text() == '{"eos_token_id": 7}  '


def test_defaults_that_differ_are_written(tmp_path: Path) -> None:
    written(made(FAMILIES["gpt_neox sequential tied"]), tmp_path / "neox", "hf")
    config = json.loads((tmp_path / "neox" / "config.json").read_text())
    expected = {
        "architectures": ["GPTNeoXForCausalLM"],
        "use_parallel_residual": False,
        "tie_word_embeddings": True,
        "hidden_act": "gelu",
        "attention_bias": True,
        "layer_norm_eps": 1e-5,
        "vocab_size": 96,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        "torch_dtype": "float32",
        "dtype": "float32",
    }
    assert {key: config[key] for key in expected} == expected
    assert "embed_out.weight" not in load_file(tmp_path / "neox" / "model.safetensors")
    written(made(FAMILIES["mistral"]), tmp_path / "mistral", "hf")
    config = json.loads((tmp_path / "mistral" / "config.json").read_text())
    assert (config["model_type"], config["sliding_window"], config["num_key_value_heads"]) == ("mistral", 6, 1)
    written(made(MODELS["llama llama3"]), tmp_path / "llama", "hf")
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert config["rope_theta"] == 10000.0
    assert config["rope_scaling"]["factor"] == config["rope_parameters"]["factor"] == 8.0


def test_both_spellings_of_old_and_new_readers(tmp_path: Path) -> None:
    """GPT-2's length was n_ctx; the kind of a linear scaling was called type."""
    written(made(FAMILIES["gpt2"], optimizer=False), tmp_path / "gpt2", "hf")
    config = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == 48
    written(made(MODELS["llama linear"], optimizer=False), tmp_path / "linear", "hf")
    config = json.loads((tmp_path / "linear" / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 4.0}
    assert open_checkpoint(tmp_path / "linear").config.model.rope_scaling.kind == "linear"


def test_shards_have_an_index(tmp_path: Path) -> None:
    source = made(FAMILIES["gpt_neox"])
    written(source, tmp_path / "out", "hf", shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("model-*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(ref.read().nbytes for ref in source.model.values())
    with torch.no_grad():
        assert torch.allclose(logits(tmp_path / "out", TOKENS), build_model(source)(TOKENS), atol=1e-5)


def test_transformers_saves_it_again_and_nothing_is_lost(tmp_path: Path) -> None:
    for kind in ("gpt_neox", "gpt2", "llama", "mistral"):
        source = made(FAMILIES[kind], optimizer=False)
        written(source, tmp_path / kind, "hf")
        opened(tmp_path / kind).save_pretrained(tmp_path / f"{kind} again")
        again = open_checkpoint(tmp_path / f"{kind} again")
        assert_same(source, replace(again, config=source.config, progress=source.progress))


def test_a_changed_config_json_is_believed(tmp_path: Path) -> None:
    """The training config beside it gives only what config.json does not tell."""
    written(made(FAMILIES["gpt_neox"]), tmp_path / "out", "hf")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"layer_norm_eps": 0.125, "use_parallel_residual": False}))
    found = open_checkpoint(tmp_path / "out").config.model
    assert (found.norm_eps, found.parallel_residual, found.vocab_size) == (0.125, False, 90)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "llama"])
def test_a_wrong_number_of_layers_is_named(kind: str, blocks: int, tmp_path: Path) -> None:
    written(made(FAMILIES[kind], optimizer=False), tmp_path / "out", "hf")
    file = tmp_path / "out" / "config.json"
    key = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: blocks}))
    with pytest.raises(CheckpointError, match=f"config.json describes {blocks} blocks, the weights have 2"):
        open_checkpoint(tmp_path / "out")
