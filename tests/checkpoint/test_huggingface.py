"""Hugging Face folders: the same logits as `transformers`, whatever the spelling, the sharding or the file type."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import load_tokenizer_for
from castalia.errors import CheckpointError
from castalia.language_model import load_model
from castalia.loading import load_weights
from castalia.model.transformer import Transformer

TOKENS = torch.arange(40).view(2, 20) % 97
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
NEOX = SMALL | {"intermediate_size": 48}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
LLAMA = NEOX | {"num_key_value_heads": 2}


def make(kind: str, folder: Path, *, max_shard_size: str = "5GB", **options: object) -> transformers.PreTrainedModel:
    """A random model with biases and norms that are not zeros and ones, saved in `folder`."""
    config = transformers.AutoConfig.for_model(kind, **options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def test_one_line_says_what_came(tmp_path: Path) -> None:
    make("llama", tmp_path, **LLAMA)
    checkpoint = open_checkpoint(tmp_path)
    report = load_weights(Transformer(checkpoint.config.model), checkpoint)
    assert str(report) == "17 of 17 tensors, 21.73K parameters, Hugging Face llama"


def assert_same_logits(folder: Path, model: transformers.PreTrainedModel) -> None:
    with torch.no_grad():
        assert torch.allclose(load_model(folder)(TOKENS), model(TOKENS).logits, atol=1e-5, rtol=1e-5)


def rewrite(folder: Path, **changes: object) -> None:
    """Change keys of config.json; None removes them."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def rope(kind: str, **values: float) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **values}}


SEQUENTIAL = {"use_parallel_residual": False, "tie_word_embeddings": True, "hidden_act": "gelu_fast"}
UNTIED = {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 40, "layer_norm_epsilon": 1e-3}
BIASES = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
CASES = {
    "neox": ("gpt_neox", NEOX),
    "neox sequential, tied, tanh": ("gpt_neox", NEOX | SEQUENTIAL),
    "neox without attention bias": ("gpt_neox", NEOX | {"attention_bias": False, "layer_norm_eps": 1e-3}),
    "neox rotary, relu": ("gpt_neox", NEOX | rope("default", partial_rotary_factor=0.5) | {"hidden_act": "relu"}),
    "gpt2": ("gpt2", GPT2),
    "gpt2 untied, erf": ("gpt2", GPT2 | UNTIED),
    "llama": ("llama", LLAMA),
    "llama without groups": ("llama", NEOX | {"rms_norm_eps": 1e-3}),
    "llama with biases, tied": ("llama", LLAMA | BIASES),
    "llama linear": ("llama", LLAMA | rope("linear", factor=4.0)),
    "llama yarn": ("llama", LLAMA | YARN),
    "llama 3": ("llama", LLAMA | LLAMA3),
    "mistral": ("mistral", LLAMA),
    "mistral window": ("mistral", LLAMA | {"sliding_window": 5}),
    "mistral one group": ("mistral", LLAMA | {"num_key_value_heads": 1, "sliding_window": None}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(tmp_path: Path, case: str) -> None:
    kind, options = CASES[case]
    assert_same_logits(tmp_path, make(kind, tmp_path, **options))


def test_old_spelling_of_rotary_keys(tmp_path: Path) -> None:
    model = make("gpt_neox", tmp_path, **NEOX | rope("default", partial_rotary_factor=0.5))
    rewrite(tmp_path, rope_parameters=None, rotary_pct=0.5, rotary_emb_base=500.0)
    assert_same_logits(tmp_path, model)
    rewrite(tmp_path, rope_theta=501.0)
    with pytest.raises(CheckpointError, match="rope_theta=501.0 and rotary_emb_base=500.0 contradict"):
        open_checkpoint(tmp_path)


def test_old_spelling_of_scaling(tmp_path: Path) -> None:
    model = make("llama", tmp_path, **LLAMA | rope("linear", factor=2.0))
    rewrite(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling={"type": "linear", "factor": 2.0})
    assert_same_logits(tmp_path, model)


@pytest.mark.parametrize(
    "kind, options, omitted",
    [
        ("gpt_neox", NEOX, ["rope_parameters", "use_parallel_residual", "tie_word_embeddings", "attention_bias"]),
        ("gpt2", GPT2, ["tie_word_embeddings", "activation_function", "n_inner"]),
        (
            "llama",
            NEOX,
            ["rope_parameters", "num_key_value_heads", "tie_word_embeddings", "attention_bias", "head_dim"],
        ),
        (
            "mistral",
            SMALL | {"num_attention_heads": 8, "intermediate_size": 48},
            ["num_key_value_heads", "sliding_window"],
        ),
    ],
)
def test_keys_left_out_mean_the_defaults_of_their_type(
    tmp_path: Path, kind: str, options: dict, omitted: list[str]
) -> None:
    model = make(kind, tmp_path, **options)
    before = open_checkpoint(tmp_path).config
    rewrite(tmp_path, **dict.fromkeys(omitted))
    assert open_checkpoint(tmp_path).config.model.model_copy(update={"num_kv_heads": None}) == before.model.model_copy(
        update={"num_kv_heads": None}
    )
    assert_same_logits(tmp_path, model)


@pytest.mark.parametrize("kind, options", [("gpt_neox", NEOX), ("gpt2", GPT2), ("llama", LLAMA)])
def test_shards_bins_buffers_and_missing_prefix(tmp_path: Path, kind: str, options: dict) -> None:
    model = make(kind, tmp_path / "shards", max_shard_size="20KB", **options)
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert_same_logits(tmp_path / "shards", model)

    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    if kind == "gpt_neox":
        old = {
            f"gpt_neox.layers.0.attention.{name}": torch.ones(1)
            for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
        }
    else:
        old = {"transformer.h.1.attn.masked_bias": torch.ones(1)} if kind == "gpt2" else {}
    bare = {name.removeprefix(model.base_model_prefix + "."): tensor for name, tensor in (tensors | old).items()}
    for name, content in {"bin": tensors | old, "bare": bare}.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text((tmp_path / "shards" / "config.json").read_text())
        torch.save(content, folder / "pytorch_model.bin")
        assert_same_logits(folder, model)

    shards[1].unlink()
    with pytest.raises(CheckpointError, match=rf"1 of {len(shards)} shards missing: {shards[1].name}"):
        open_checkpoint(tmp_path / "shards")


def test_slices_come_from_the_files(tmp_path: Path) -> None:
    make("llama", tmp_path, **LLAMA)
    make("gpt2", tmp_path / "gpt2", **GPT2)
    for folder in (tmp_path, tmp_path / "gpt2"):
        for ref in open_checkpoint(folder).model.values():
            whole = ref.read()
            part = [slice(size // 3, size - size // 4) for size in ref.shape]
            assert whole.shape == ref.shape
            assert torch.equal(ref.read(part), whole[tuple(part)])


def test_symlinks_of_the_cache_and_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gpt2", tmp_path / "real", **GPT2)
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "real").iterdir():
        (snapshot / file.name).symlink_to(file)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "step1000").write_text("abc123")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("some/model@step1000", "some/model@abc123"):
        assert open_checkpoint(name).path == str(snapshot)
    with torch.no_grad():
        assert torch.allclose(load_model("some/model@step1000")(TOKENS), model(TOKENS).logits, atol=1e-5)
    with pytest.raises(CheckpointError, match="hf download some/model --revision main"):
        open_checkpoint("some/model")


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"model_type": "falcon", "architectures": ["FalconForCausalLM"]},
            r"'falcon' \(FalconForCausalLM\) is not supported",
        ),
        ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic' is not supported"),
        ({"head_dim": 16}, r"a tensor of shape \(32, 32\) should have 64 rows"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized \(gptq\)"),
        ({"hidden_size": "many"}, "not a usable config|head_dim|not a whole number"),
        ({"num_hidden_layers": 3}, "config.json describes 3 blocks, the weights have 2"),
        ({"num_hidden_layers": 1}, "config.json describes 1 blocks, the weights have 2"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, changes: dict, message: str) -> None:
    make("llama", tmp_path, **LLAMA)
    rewrite(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_head_that_is_missing_is_named(tmp_path: Path) -> None:
    make("llama", tmp_path, **LLAMA)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing: lm_head.weight"):
        open_checkpoint(tmp_path)


def test_bad_weights_are_refused(tmp_path: Path) -> None:
    make("gpt2", tmp_path, **GPT2)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    for damaged in (data[:-4], data[:100], b"", (1 << 60).to_bytes(8, "little") + data[8:]):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="truncated"):
            open_checkpoint(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="no weights: expected one of model.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"wte.weight": "../x.safetensors"}}')
    with pytest.raises(CheckpointError, match="refused"):
        open_checkpoint(tmp_path)


class Trap:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


def test_nothing_in_a_bin_file_runs(tmp_path: Path) -> None:
    make("gpt2", tmp_path, **GPT2)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for content in (Trap(tmp_path / "ran"), tensors | {"x": Trap(tmp_path / "ran")}):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="refused"):
            open_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_tokenizer_of_the_folder(tmp_path: Path, fixtures: Path) -> None:
    make("gpt_neox", tmp_path, **NEOX)
    (tmp_path / "tokenizer.json").write_bytes((fixtures / "tokenizer" / "20B_tokenizer.json").read_bytes())
    assert load_tokenizer_for(open_checkpoint(tmp_path)).decode([12092]) == "Hello"


def test_genuine_conversions_give_the_original_logits(fixtures: Path) -> None:
    folders = sorted(fixtures.glob("neox/*/hf"))
    assert len(folders) >= 7
    for folder in folders:
        expected = np.load(folder.parent / "expected_logits.npz")
        with torch.no_grad():
            logits = load_model(folder)(torch.from_numpy(expected["input_ids"])).numpy()
        tolerance = 4e-3 if "fp16" in str(folder) else 3e-2 if "bf16" in str(folder) else 2e-6
        assert np.abs(logits - expected["logits"]).max() <= tolerance, folder
