"""GGUF files of the model types that `dense_architectures.py` knows, by the names of the package `gguf`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from castalia.checkpoint.formats.gguf.dense_architectures import DENSE
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import ModelConfig, TokenizerConfig
from castalia.errors import CheckpointError
from castalia.examine.verify import verify
from castalia.language_model import load_model
from tests.checkpoint.hf_families import saved
from tests.checkpoint.test_gguf import field, planned, to_file, words  # noqa: F401 - a fixture

TOKENS = torch.arange(80).view(2, 40) * 7 % 270
# The case of `CASES` -> the architecture, and what its file says beside the sizes.
HELD: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"attention.head_count_kv": 2, "rope.dimension_count": 8}),
    "qwen3": ("qwen3", {"attention.key_length": 12, "attention.value_length": 12, "rope.dimension_count": 12}),
    "gemma": ("gemma", {"attention.key_length": 12, "attention.head_count_kv": 1}),
    "gemma2 for llama.cpp": (
        "gemma2",
        {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 3.0, "attention.sliding_window": 5},
    ),
    "olmo": ("olmo", {"attention.clamp_kqv": pytest.approx(0.3), "attention.layer_norm_epsilon": pytest.approx(1e-5)}),
    "olmo2": ("olmo2", {"attention.layer_norm_rms_epsilon": pytest.approx(1e-5)}),
    "smollm3 for llama.cpp": ("smollm3", {"attention.head_count_kv": 2}),
    "stablelm": ("stablelm", {"rope.dimension_count": 2, "use_parallel_residual": False}),
    "stablelm 2": ("stablelm", {"attention.head_count_kv": 2}),
    "stablelm 2, 12B": ("stablelm", {"use_parallel_residual": True}),
    "phi": ("phi2", {"rope.dimension_count": 4, "attention.layer_norm_epsilon": pytest.approx(1e-5)}),
    "bloom": ("bloom", {"attention.head_count": 4}),
    "bloom with six heads": ("bloom", {"attention.head_count": 6}),
}


def opened(case: str, folder: Path, words: Path) -> tuple[Any, Checkpoint]:  # noqa: F811
    theirs = saved(case, folder, vocab_size=288)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config is not None
    return theirs, replace(checkpoint, config=checkpoint.config.with_({"tokenizer": TokenizerConfig(path=str(words))}))


def expected(folder: Path, kind: str, model: ModelConfig) -> dict[str, np.ndarray]:
    """The tensors of llama.cpp's own converter, by the map of names that it uses."""
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[kind], model.num_layers)
    found: dict[str, np.ndarray] = {}
    norms: dict[str, list[np.ndarray]] = {}
    for theirs, value in load_file(folder / "model.safetensors").items():
        if ".norms." in theirs:  # of StableLM's heads, one tensor for each
            module, _, number = theirs.removesuffix(".weight").partition(".norms.")
            norms.setdefault(f"{module}.weight", []).append((int(number), value))
            continue
        known = theirs.removeprefix("transformer.") if kind == "bloom" else theirs  # as its first files have them
        new = names.get_name(known, try_suffixes=(".weight", ".bias"))
        assert new is not None, theirs
        if kind in ("olmo", "smollm3") and ("attn_q." in new or "attn_k." in new):  # halves -> pairs of neighbours
            count = model.num_heads if "attn_q." in new else model.kv_heads
            value = value.reshape(count, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if kind.startswith("gemma") and "norm" in new:
            value = value + 1
        if kind == "bloom" and "attn_qkv" in new:  # query, key, value of each head -> all queries, keys, values
            grid = value.reshape(model.num_heads, 3, model.head_size, *value.shape[1:])
            value = np.concatenate([grid[:, j].reshape(-1, *value.shape[1:]) for j in range(3)])
        found[new] = value
    for name, parts in norms.items():
        new = names.get_name(name, try_suffixes=(".weight",))
        assert new is not None, name
        found[new] = np.stack([value for _, value in sorted(parts, key=lambda part: part[0])])
    return found


@torch.no_grad()
@pytest.mark.parametrize("case", HELD)
def test_names_rows_and_settings_are_those_of_llama_cpp(case: str, tmp_path: Path, words: Path) -> None:  # noqa: F811
    kind, settings = HELD[case]
    theirs, checkpoint = opened(case, tmp_path / "hf", words)
    plan = to_file(checkpoint, tmp_path / "model.gguf", "f32")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert field(reader, "general.architecture") == kind
    assert {key: field(reader, f"{kind}.{key}") for key in settings} == settings
    wanted = expected(tmp_path / "hf", kind, checkpoint.config.model)
    tensors = {each.name: each.data.reshape(tuple(reversed(each.shape.tolist()))) for each in reader.tensors}
    for name, value in wanted.items():
        np.testing.assert_array_equal(tensors[name], value, name)
    more = tensors.keys() - wanted.keys()
    assert more <= {"output.weight"}  # a copy of the embedding, where llama.cpp knows no tied head
    for name in more:
        np.testing.assert_array_equal(tensors[name], wanted["token_embd.weight"])

    back = open_checkpoint(tmp_path / "model.gguf")
    assert verify(checkpoint, back, None, plan.held).max_diff == 0
    torch.testing.assert_close(load_model(tmp_path / "model.gguf")(TOKENS), theirs(TOKENS).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_gpt_j_is_written_as_phi_with_biases_that_are_zero(tmp_path: Path, words: Path) -> None:  # noqa: F811
    theirs, checkpoint = opened("gptj", tmp_path / "hf", words)
    to_file(checkpoint, tmp_path / "model.gguf", "f32")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert field(reader, "general.architecture") == "phi2" and field(reader, "phi2.rope.dimension_count") == 4
    zeros = {each.name.split(".")[-2] for each in reader.tensors if not each.data.any()}
    assert zeros == {"attn_q", "attn_k", "attn_v", "attn_output"}
    torch.testing.assert_close(load_model(tmp_path / "model.gguf")(TOKENS), theirs(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_what_gemma2_fixes_is_named() -> None:
    sizes = {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "head_dim": 12}
    lacks = DENSE["gemma2"].lacks(ModelConfig(**sizes, sliding_window=4, attention_scale=0.5, logit_softcap=30.0))
    assert lacks == [
        "model.attention_softcap=None (only a number)",
        "model.window_pattern=(True,) (only (True, False))",
        "model.attention_scale=0.5 (only None)",
    ]
    caps = {"attention_softcap": 50.0, "logit_softcap": 30.0}
    large = ModelConfig(**sizes | {"num_layers": 46, "head_dim": 4}, **caps, attention_scale=8**-0.5)
    assert DENSE["gemma2"].lacks(large) == [] != DENSE["gemma2"].lacks(large.with_({"attention_scale": None}))


def test_every_architecture_is_tried() -> None:
    assert {kind for kind, _ in HELD.values()} == DENSE.keys()


@pytest.mark.parametrize("case", ["gemma2 for llama.cpp", "stablelm 2, 12B"])
def test_norms_stay_fp32_and_only_matrices_are_rounded(case: str, tmp_path: Path, words: Path) -> None:  # noqa: F811
    _, checkpoint = opened(case, tmp_path / "hf", words)
    plan = to_file(checkpoint, tmp_path / "model.gguf", "q8_0")
    for each in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        is_matrix = len(each.shape) > 1 and "norm" not in each.name
        assert (each.tensor_type == gguf.GGMLQuantizationType.F32) != is_matrix, each.name
    assert verify(checkpoint, open_checkpoint(tmp_path / "model.gguf"), None, plan.held).holds


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("gpt_neo", "model.attention_scale=1.0"),
        ("opt", "model.position_offset=2"),
        ("gemma2", r"model.attention_scale=0.408\d* \(only None\)"),
        ("gemma2 without caps", "model.attention_bias=True"),
        ("qwen2 windows", r"model.sliding_window=4 \(only None\)"),
        ("qwen3 windows, biases", r"model.attention_bias=True \(only False\)"),
        ("smollm3", r"model.rotary_pattern=\(True, False\)"),
        ("olmo2 biases", r"model.attention_bias=True \(only False\)"),
        ("phi with qk norms, grouped", r"model.qk_norm=head \(only False\)"),
    ],
)
def test_what_llama_cpp_lacks_is_named(case: str, named: str, tmp_path: Path, words: Path) -> None:  # noqa: F811
    _, checkpoint = opened(case, tmp_path, words)
    with pytest.raises(CheckpointError, match=named):
        planned(checkpoint)
