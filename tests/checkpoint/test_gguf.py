"""GGUF files: read by the package `gguf`, compared with the Hugging Face folder of the same checkpoint."""

from __future__ import annotations

import json
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from safetensors.numpy import load_file
from tokenizers import decoders, models, normalizers, pre_tokenizers

from castalia.checkpoint import convert
from castalia.checkpoint.file_plan import Plan, WriteOptions
from castalia.checkpoint.formats.gguf.gguf_vocabulary import CONTROL, LLAMA3, QWEN2, UNUSED, USER_DEFINED, vocabulary
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import ModelConfig, RopeScaling, TokenizerConfig
from castalia.data.tokenizer import RustTokenizer, Tokenizer, load_tokenizer, train_bpe
from castalia.errors import CheckpointError
from castalia.examine.verify import verify
from castalia.storage.gguf_file import GgufFile, Stored, dequantize, open_gguf, quantize
from castalia.storage.lazy import InMemory, same_bits
from tests.checkpoint.made import FAMILIES, LLAMA, SIZES, made, written

TEXT = "In the beginning was the Word, and 1,234 words\n\n  were with  it: 'tis so, we'll see."
TEXTS = [TEXT, "Äpfel, naïve 東京 👍 and\ttabs", "a", "  ", "\n\n\n", "x" * 40, "12345 67", "the " * 9]
HELD = [name for name in FAMILIES if name not in ("gpt2 untied", "mistral")]  # relu, and a window
TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}  # in the file


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of 270 ids."""
    folder = tmp_path_factory.mktemp("words")
    train_bpe([TEXT, *TEXTS], 270).save(folder)
    return folder


def a_checkpoint(model: ModelConfig, words: Path, **changes: Any) -> Checkpoint:
    checkpoint = made(model.with_({"vocab_size": 270}), **changes)
    assert checkpoint.config is not None
    return replace(checkpoint, config=checkpoint.config.with_({"tokenizer": TokenizerConfig(path=str(words))}))


def planned(checkpoint: Checkpoint, kind: str | None = None) -> Plan:
    return convert.plan_files("gguf", convert.prepare(checkpoint, None, False), WriteOptions(gguf_type=kind))


def to_file(checkpoint: Checkpoint, path: Path, kind: str | None = None) -> Plan:
    plan = planned(checkpoint, kind)
    convert.write(plan, path, "mark", lambda count: None)
    assert path.stat().st_size == plan.num_bytes
    return plan


def field(reader: gguf.GGUFReader, key: str) -> Any:
    found = reader.get_field(key)
    return None if found is None else found.contents()


def expected(folder: Path, kind: str, model: ModelConfig) -> dict[str, np.ndarray]:
    """The tensors that llama.cpp wants, from those of a Hugging Face folder, in the order of its own converter."""
    theirs, result = load_file(folder / "model.safetensors"), {}
    heads, size = model.num_heads, model.head_size
    names = {
        "gptneox": {"embed_in": "token_embd", "final_layer_norm": "output_norm", "embed_out": "output",
                    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
                    "attention.query_key_value": "attn_qkv", "attention.dense": "attn_output",
                    "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down"},
        "gpt2": {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm",
                 "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up",
                 "mlp.c_proj": "ffn_down", "lm_head": "output"},
        "llama": {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
                  "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
                  "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
                  "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
    }[kind]  # fmt: skip
    for full, value in theirs.items():
        name = full.removeprefix("gpt_neox.").removeprefix("transformer.").removeprefix("model.")
        block = ""
        if name.startswith(("layers.", "h.")):
            _, number, name = name.split(".", 2)
            block = f"blk.{number}."
        module, _, part = name.rpartition(".")
        new = names[module]
        if new == "attn_qkv" and kind == "gptneox":  # query, key and value of each head -> all queries, keys, values
            grid = value.reshape(heads, 3, size, *value.shape[1:])
            value = np.concatenate([grid[:, j].reshape(heads * size, *value.shape[1:]) for j in range(3)])
        if kind == "gpt2" and part == "weight" and module.startswith(("attn.", "mlp.")):
            value = value.T
        if new in ("attn_q", "attn_k"):  # halves of each head -> pairs of neighbours
            count = heads if new == "attn_q" else model.kv_heads
            value = value.reshape(count, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        result[f"{block}{new}.{part}"] = value
    return result


@pytest.mark.parametrize("family", HELD)
def test_the_package_gguf_reads_the_sources_tensors(family: str, tmp_path: Path, words: Path) -> None:
    checkpoint = a_checkpoint(FAMILIES[family], words)
    model = checkpoint.config.model
    written(checkpoint, tmp_path / "hf", "hf")
    to_file(checkpoint, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    kind = field(reader, "general.architecture")
    wanted = expected(tmp_path / "hf", kind, model)
    tensors = {each.name: each for each in reader.tensors}
    for name, each in tensors.items():
        value = each.data.reshape(tuple(reversed(each.shape.tolist())))
        if name in wanted:
            np.testing.assert_array_equal(value, wanted[name], name)
        elif name == "output.weight":  # gptneox has no tied head
            np.testing.assert_array_equal(value, wanted["token_embd.weight"])
        else:  # biases that gptneox needs
            assert name.endswith(".bias") and not value.any()
    assert wanted.keys() <= tensors.keys()
    keys = {
        "block_count": 2, "embedding_length": 32, "attention.head_count": 4, "context_length": 48,
        "attention.head_count_kv": model.kv_heads, "feed_forward_length": model.mlp_width, "vocab_size": 288,
        "use_parallel_residual": model.parallel_residual if kind == "gptneox" else None,
        "rope.dimension_count": model.rotary_size if model.position == "rotary" else None,
        "rope.freq_base": model.rotary_base if model.position == "rotary" else None,
    }  # fmt: skip
    assert {key: field(reader, f"{kind}.{key}") for key in keys} == keys
    epsilon = "rms_epsilon" if kind == "llama" else "epsilon"
    assert field(reader, f"{kind}.attention.layer_norm_{epsilon}") == pytest.approx(model.norm_eps)
    assert field(reader, "tokenizer.ggml.tokens")[270:] == [f"[PAD{i}]" for i in range(270, 288)]


@pytest.mark.parametrize("kind", TYPES)
def test_types_of_matrices(kind: str, tmp_path: Path, words: Path) -> None:
    checkpoint = a_checkpoint(ModelConfig(**SIZES | LLAMA | {"mlp_size": 64}), words)
    to_file(checkpoint, tmp_path / "wide.gguf", "f32")
    plan = to_file(checkpoint, tmp_path / "model.gguf", kind)
    wide = {each.name: each for each in gguf.GGUFReader(tmp_path / "wide.gguf").tensors}
    for each in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        source = wide[each.name].data
        if len(each.shape) == 1:
            assert each.tensor_type == gguf.GGMLQuantizationType.F32
            np.testing.assert_array_equal(each.data, source)
            continue
        assert each.tensor_type == TYPES[kind]
        if kind == "bf16":
            source = torch.from_numpy(source.copy()).bfloat16().view(torch.uint8).numpy()
        elif kind != "f32":
            source = gguf.quants.quantize(source, each.tensor_type)
        np.testing.assert_array_equal(
            each.data.view(np.uint8), source.view(np.uint8).reshape(each.data.view(np.uint8).shape)
        )
    result = open_checkpoint(tmp_path / "model.gguf")
    assert result.format == "gguf" and result.facts.model_type == "llama"
    proof = verify(checkpoint, result, None, plan.held)
    assert proof.holds and proof.equal_tensors == proof.num_tensors and proof.max_diff <= {"f32": 0}.get(kind, 0.2)
    wrong = {**result.model, "blocks.0.attn.qkv.weight": result.model["blocks.1.attn.qkv.weight"]}
    assert not verify(checkpoint, replace(result, model=wrong), None, plan.held).holds  # the proof can fail


def test_q8_0_is_that_of_ggml() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, 96, generator=generator) * 10 ** torch.randn(64, 1, generator=generator)
    values[3], values[4, :32], values[5, :] = 0, 2.0 ** torch.arange(-16, 16), 0.5
    packed = quantize(values)
    theirs = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(packed.numpy(), theirs)
    np.testing.assert_array_equal(
        dequantize(packed).numpy(), gguf.quants.dequantize(theirs, gguf.GGMLQuantizationType.Q8_0)
    )


@pytest.mark.parametrize(
    ("family", "scaling"),
    [
        ("gpt_neox", RopeScaling(kind="linear", factor=4.0)),
        ("llama", RopeScaling(kind="yarn", factor=8.0, original_positions=16, attention_factor=1.1)),
        ("llama", RopeScaling(kind="llama3", factor=8.0, original_positions=24)),
    ],
)
def test_rotary_scaling_comes_back(family: str, scaling: RopeScaling, tmp_path: Path, words: Path) -> None:
    checkpoint = a_checkpoint(FAMILIES[family].with_({"rope_scaling": scaling}), words)
    plan = to_file(checkpoint, tmp_path / "model.gguf")
    result = open_checkpoint(tmp_path / "model.gguf")
    assert result.config.model.rope_scaling == scaling
    assert verify(checkpoint, result, None, plan.held).max_diff < 1e-5


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("gpt_neox", {"position": "alibi"}, r"model.position=alibi"),
        ("gpt_neox", {"activation": "relu"}, r"model.activation=relu \(only gelu"),
        ("gpt_neox", {"qk_norm": True}, r"model.qk_norm=True \(only False\)"),
        ("gpt_neox", {"rope_scaling": RopeScaling(kind="llama3", factor=8.0)}, "only linear or yarn"),
        ("llama", {"rotary_pct": 0.5}, r"model.rotary_pct=0.5 \(only 1.0\)"),
        ("llama", {"rms_eps_inside": False}, r"model.rms_eps_inside=False"),
        ("llama", {"rope_scaling": RopeScaling(kind="yarn", factor=8.0, beta_fast=16.0)}, "beta_fast=16.0"),
        ("mistral", {}, r"model.sliding_window=5 \(only None\)"),
    ],
)
def test_models_that_llama_cpp_lacks_are_refused(family: str, changes: dict, named: str, words: Path) -> None:
    with pytest.raises(CheckpointError, match=named):
        planned(a_checkpoint(FAMILIES[family].with_(changes), words))


def test_a_window_as_long_as_the_longest_sequence_hides_nothing(words: Path) -> None:
    planned(a_checkpoint(FAMILIES["mistral"].with_({"sliding_window": 47}), words))


def test_what_is_not_ours_is_refused(tmp_path: Path, words: Path) -> None:
    checkpoint = a_checkpoint(FAMILIES["llama"], words)
    path = tmp_path / "model.gguf"
    to_file(checkpoint, path)
    content = path.read_bytes()

    def damaged(data: bytes, match: str) -> None:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=match):
            open_checkpoint(path)

    damaged(content[:-40], "is truncated")
    damaged(content[:300], "its header does not end")
    damaged(content[:4] + b"\x09" + content[5:], "not a GGUF file of version 2 or 3")
    damaged(content.replace(b"llama", b"lemma"), "'lemma' is not supported; supported are gptneox, gpt2, llama")
    at = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    damaged(content[:at] + b"\x0c" + content[at + 1 :], "token_embd.weight is stored as q4_K")
    with pytest.raises(CheckpointError, match="holds its tokenizer, which is missing"):
        planned(made(FAMILIES["llama"]))


def with_values(path: Path, words: Path, values: dict[str, Any], family: str, **tensors: torch.Tensor) -> Path:
    """A well-formed file whose metadata has other values (None: leaves the key out), and which has other tensors."""
    if not path.exists():
        to_file(a_checkpoint(FAMILIES[family], words), path)
    contents = open_gguf(path)
    metadata = {key: value for key, value in {**contents.metadata, **values}.items() if value is not None}
    refs = {**contents.tensors, **{name.replace("__", "."): InMemory(value) for name, value in tensors.items()}}
    path = path.with_name("other.gguf")
    GgufFile(metadata, {name: Stored(ref, "f32") for name, ref in refs.items()}).write(path, lambda count: None)
    return path


@pytest.mark.parametrize(
    ("family", "values", "match"),
    [
        ("llama", {"general.architecture": ["llama"]}, r"general.architecture \['llama'\] is not supported"),
        ("gpt2", {"gpt2.attention.layer_norm_epsilon": "small"}, "epsilon is 'small', which is not a finite number"),
        ("gpt2", {"gpt2.attention.layer_norm_epsilon": [1e-5]}, "epsilon is .*, which is not a finite number"),
        ("llama", {"llama.rope.freq_base": float("inf")}, "freq_base is inf, which is not a finite number"),
        ("llama", {"llama.rope.dimension_count": float("inf")}, "dimension_count is inf, which is not a whole number"),
        ("llama", {"llama.block_count": True}, "block_count is True, which is not a whole number"),
        ("llama", {"llama.attention.head_count_kv": [2, 2]}, r"kv is \[2, 2\], which is not a whole number"),
        ("llama", {"llama.attention.head_count": 0}, "=32 is no multiple of attention.head_count=0"),
        ("llama", {"llama.attention.head_count": 64}, "=32 is no multiple of attention.head_count=64"),
        ("llama", {"llama.rope.scaling.type": 1}, "scaling.type is 1, which is not a text"),
        ("gpt_neox", {"gptneox.use_parallel_residual": "yes"}, "residual is 'yes', which is not a truth value"),
        ("llama", {"llama.context_length": None}, "llama.context_length is missing"),
        ("llama", {"llama.rope.scaling.type": "yarn"}, "type is 'yarn', but rope.scaling.factor is missing"),
        ("llama", {"llama.rope.scaling.type": "longrope"}, "'longrope' is not supported; known are linear and yarn"),
        ("llama", {"llama.rope.scaling.attn_factor": 1.5}, "attn_factor is supported for yarn alone"),
        ("llama", {"llama.rope.scaling.yarn_beta_fast": 8.0}, "llama.rope.scaling.yarn_beta_fast=8.0 is not supported"),
        ("llama", {"llama.rope.dimension_count": 4}, r"llama computes: model.rotary_pct=0.5 \(only 1.0\)"),
        ("llama", {"llama.logit_scale": 0.5}, "llama.logit_scale=0.5 is not supported"),
        ("llama", {"llama.attention.key_length": 16}, "llama.attention.key_length=16 is not supported"),
        ("llama", {"llama.expert_count": 8}, "llama.expert_count=8 is not supported"),
        (
            "llama",
            {"general.architecture": "qwen3moe"},
            "general.architecture 'qwen3moe' is not supported; supported are",
        ),
        ("llama", {"llama.attention.sliding_window": 7}, "llama.attention.sliding_window=7 is not supported"),
        ("llama", {"llama.of_tomorrow": 0}, "llama.of_tomorrow=0 is not supported"),
        ("gpt2", {"gpt2.use_parallel_residual": True}, "gpt2.use_parallel_residual=True is not supported"),
        ("gpt2", {"gpt2.rope.scaling.factor": 4.0}, "gpt2.rope.scaling.factor=4.0 is not supported"),
    ],
)
def test_values_that_are_not_understood_are_refused(
    family: str, values: dict, match: str, tmp_path: Path, words: Path
) -> None:
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(with_values(tmp_path / "model.gguf", words, values, family))


def test_an_embedding_without_dimensions_and_two_scalings_are_refused(tmp_path: Path, words: Path) -> None:
    path = with_values(tmp_path / "model.gguf", words, {}, "llama", token_embd__weight=torch.tensor(1.0))
    with pytest.raises(CheckpointError, match="token_embd.weight is missing, or has no dimensions"):
        open_checkpoint(path)
    factors, four = {"rope_freqs__weight": torch.ones(4)}, {"llama.rope.scaling.factor": 4.0}
    path = with_values(tmp_path / "model.gguf", words, four, "llama", **factors)
    with pytest.raises(CheckpointError, match="rope_freqs.weight together with rope.scaling.factor"):
        open_checkpoint(path)
    path = with_values(tmp_path / "model.gguf", words, {"castalia.rope_scaling": 4}, "llama", **factors)
    with pytest.raises(CheckpointError, match="not a usable model"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("values", "factor"),
    [
        ({"rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scale_linear": 4.0}, 4.0),
        ({"rope.scaling.factor": 8.0, "rope.scale_linear": 4.0, "rope.scaling.type": "linear"}, 8.0),
        ({"rope.scaling.factor": 0.0}, None),
        ({"rope.scaling.factor": 4.0, "rope.scaling.type": "none"}, None),
        ({"attention.key_length": 8, "expert_count": 0, "logit_scale": 1.0, "rope.scaling.yarn_beta_slow": 1.0}, None),
    ],
)
def test_values_are_taken_as_llama_cpp_takes_them(
    values: dict, factor: float | None, tmp_path: Path, words: Path
) -> None:
    path = with_values(tmp_path / "model.gguf", words, {f"llama.{key}": v for key, v in values.items()}, "llama")
    scaling = open_checkpoint(path).config.model.rope_scaling
    assert scaling == (RopeScaling(kind="linear", factor=factor) if factor else None)


def test_damaged_counts_of_a_large_file_are_refused_before_it_is_read(tmp_path: Path, words: Path) -> None:
    path = tmp_path / "model.gguf"
    to_file(a_checkpoint(FAMILIES["llama"], words), path)
    content = path.read_bytes()
    tokens = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    for place in (8, 16, 24, tokens):  # of tensors, of values, of the first key's signs, of tokens
        path.write_bytes(content[:place] + struct.pack("<Q", 1 << 28) + content[place + 8 :])
        with open(path, "r+b") as file:
            file.truncate(1 << 31)  # zeros that take no place
        tracemalloc.start()
        with pytest.raises(CheckpointError, match="truncated or damaged: its header does not end"):
            open_gguf(path)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 1 << 24


def test_flipped_bytes_of_the_header_end_in_one_kind_of_error(tmp_path: Path, words: Path) -> None:
    path, draws = tmp_path / "model.gguf", np.random.default_rng(0)
    to_file(a_checkpoint(FAMILIES["llama"], words), path)
    content = path.read_bytes()
    table = content.index(b"tokenizer.ggml.bos_token_id")
    places = [*range(content.index(b"tokenizer.ggml.tokens") + 60), *range(table, table + 1500)]
    refused = 0
    for _ in range(150):
        data = bytearray(content)
        data[int(draws.choice(places))] = int(draws.integers(256))
        path.write_bytes(data)
        try:
            for ref in open_checkpoint(path).model.values():
                ref.read()
        except CheckpointError:
            refused += 1
    assert refused > 50


def test_the_destination(tmp_path: Path, words: Path) -> None:
    checkpoint, path = a_checkpoint(FAMILIES["gpt2"], words), tmp_path / "model.gguf"
    convert.check_destination(Path("elsewhere"), path, False, True)
    to_file(checkpoint, path)
    first = path.read_bytes()
    assert [each.name for each in tmp_path.iterdir()] == ["model.gguf"]
    with pytest.raises(CheckpointError, match="exists already"):
        convert.check_destination(Path("elsewhere"), path, False, True)
    convert.check_destination(Path("elsewhere"), path, True, True)
    with pytest.raises(CheckpointError, match="exists already"):
        to_file(checkpoint, path)
    convert.write(planned(checkpoint, "f16"), path, "mark", lambda count: None, force=True)
    assert path.read_bytes() != first and [each.name for each in tmp_path.iterdir()] == ["model.gguf"]
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        convert.check_destination(Path("elsewhere"), tmp_path / "notes.txt", True, True)
    with pytest.raises(CheckpointError, match="is a folder"):
        convert.check_destination(Path("elsewhere"), tmp_path, True, True)


def test_values_too_large_for_their_type(tmp_path: Path, words: Path) -> None:
    checkpoint = a_checkpoint(FAMILIES["gpt2"], words, scale=1e6)
    with pytest.raises(CheckpointError, match="too large for float16"):
        to_file(checkpoint, tmp_path / "model.gguf", "f16")
    checkpoint = a_checkpoint(FAMILIES["gpt2"], words, scale=1e9)
    with pytest.raises(CheckpointError, match="q8_0 cannot hold a value of"):
        to_file(checkpoint, tmp_path / "model.gguf", "q8_0")
    assert not (tmp_path / "model.gguf").exists()


# The tokenizer.


def metadata(tokenizer: Tokenizer, rows: int | None = None) -> dict[str, Any]:
    values, _ = vocabulary(tokenizer, rows or tokenizer.vocab_size)
    return {key.removeprefix("tokenizer.ggml."): value for key, value in values.items()}


def test_the_vocabulary_of_gpt_neox(fixtures: Path) -> None:
    tokenizer = load_tokenizer(TokenizerConfig(path=str(fixtures / "tokenizer" / "20B_tokenizer.json")))
    values, notes = vocabulary(tokenizer, 50304)
    assert "NFC" in notes[0]
    assert values["tokenizer.ggml.pre"] == "gpt-2" and values["tokenizer.ggml.model"] == "gpt2"
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 50304 and tokens[0] == "<|endoftext|>"
    assert types[:2] == [CONTROL, CONTROL] and tokens[50254].isspace() and types[50254] == USER_DEFINED
    assert set(types[50277:]) == {UNUSED}
    assert values["tokenizer.ggml.eos_token_id"] == values["tokenizer.ggml.bos_token_id"] == 0
    assert values["tokenizer.ggml.add_bos_token"] is False and len(values["tokenizer.ggml.merges"]) > 50000


def byte_level(pre: Any, normalizer: Any = None, **model: Any) -> RustTokenizer:
    base = train_bpe([TEXT], 270)
    content = json.loads(base.engine.to_str())["model"]
    merges = [tuple(merge) for merge in content["merges"]]
    engine = tokenizers.Tokenizer(models.BPE(content["vocab"], merges, **model))
    engine.pre_tokenizer, engine.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        engine.normalizer = normalizer
    engine.add_special_tokens(["<|endoftext|>"])
    return RustTokenizer(engine)


def split(pattern: str) -> Any:
    parts = [
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(parts)


WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    ("tokenizer", "name"),
    [
        (byte_level(WORDS), "gpt-2"),
        (byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS])), "smollm"),
        (byte_level(split(LLAMA3), ignore_merges=True), "llama-bpe"),
        (byte_level(split(LLAMA3)), "dbrx"),
        (byte_level(split(QWEN2), normalizers.NFC()), "qwen2"),
    ],
)
def test_pre_tokenizers_are_known_by_their_rules(tokenizer: RustTokenizer, name: str) -> None:
    assert metadata(tokenizer)["pre"] == name


@pytest.mark.parametrize(
    ("tokenizer", "named"),
    [
        (byte_level(split(r"\p{N}{1,2}|.")), r"no name there: split \\p\{N\}\{1,2\}"),
        (byte_level(split(QWEN2), ignore_merges=True), "words that are tokens taken whole"),
        (byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "with a space in front"),
        (
            byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), WORDS])),
            "runs of digits",
        ),
        (byte_level(WORDS, normalizers.Lowercase()), r"changes texts before it cuts them \(Lowercase\)"),
        (RustTokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, "a"))), "its model is WordLevel"),
        (load_tokenizer(TokenizerConfig(kind="char")), "it is char, not a BPE with merges"),
    ],
)
def test_tokenizers_that_llama_cpp_lacks_are_refused(tokenizer: Tokenizer, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        metadata(tokenizer)


def test_special_ids_and_the_chat_template(tmp_path: Path) -> None:
    base = train_bpe([TEXT], 270)
    base.engine.add_special_tokens(["<s>", "<pad>", "<|im_end|>"])
    base.engine.add_tokens(["  two"])
    (tmp_path / "tokenizer.json").write_text(base.engine.to_str())
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    settings = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<pad>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 272]}))
    tokenizer = load_tokenizer(TokenizerConfig(path=str(tmp_path)))
    values = metadata(tokenizer, 280)
    assert values["tokenizer.chat_template"] == template
    ids = {"bos": 270, "eos": 0, "padding": 271, "eot": 272}
    assert {key: values[f"{key}_token_id"] for key in ids} == ids
    assert (values["add_bos_token"], values["add_eos_token"]) == (True, False)
    assert values["token_type"][270:] == [CONTROL] * 3 + [USER_DEFINED] + [UNUSED] * 6
    _, notes = vocabulary(tokenizer, 272)
    assert "the embedding has 272 rows; tokens without one are left out: <|im_end|>,   two" in notes


def test_bytes_are_a_vocabulary_without_merges() -> None:
    values = metadata(load_tokenizer(TokenizerConfig(kind="bytes")))
    decoder = decoders.ByteLevel()
    shown = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in TEXTS:
        (piece, _), *_ = shown.pre_tokenize_str(text)
        assert [values["tokens"].index(sign) for sign in piece] == list(text.encode()) and decoder.decode(
            [piece]
        ) == text
    assert values["merges"] == [] and values["eos_token_id"] == 256


def merged(text: str, values: dict[str, Any]) -> list[int]:
    """What llama.cpp makes of a text with a vocabulary of its kind "llama": it merges the pair that scores highest."""
    ids = {token: i for i, token in enumerate(values["tokens"])}
    parts = list((" " * values["add_space_prefix"] + text).replace(" ", "▁"))
    while True:
        pairs = [
            (-values["scores"][ids[parts[i] + parts[i + 1]]], i)
            for i in range(len(parts) - 1)
            if parts[i] + parts[i + 1] in ids
        ]
        if not pairs:
            break
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    single = [[ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()] for part in parts]
    first = [values["bos_token_id"]] if values["add_bos_token"] else []
    return first + [i for group in single for i in group]


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model as Llama's: BPE with tokens for single bytes, texts as they are."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text.txt").write_text("\n".join([TEXT.replace("\n", " "), "the Word and the word " * 5, "12345"] * 3))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=340, model_type="bpe",
        byte_fallback=True, character_coverage=0.98, normalization_rule_name="identity", add_dummy_prefix=True,
        remove_extra_whitespaces=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return folder


def test_scores_of_a_sentencepiece_model_merge_as_it_does(pieces: Path) -> None:
    tokenizer = load_tokenizer(TokenizerConfig(path=str(pieces / "tokenizer.model")))
    values = metadata(tokenizer, 384)
    assert values["model"] == "llama" and values["add_space_prefix"] and values["add_bos_token"]
    for text in TEXTS:
        assert merged(text, values) == tokenizer.encode(text), text


def test_scores_of_a_tokenizer_json_merge_as_its_merges_do(pieces: Path) -> None:
    """As transformers makes it of a SentencePiece model: a merge for each way to cut a token into two."""
    source = load_tokenizer(TokenizerConfig(path=str(pieces / "tokenizer.model")))
    engine = source.engine
    ids = {engine.id_to_piece(i): i for i in range(engine.vocab_size())}
    normal = [
        piece for piece, i in ids.items() if not (engine.is_control(i) or engine.is_byte(i) or engine.is_unknown(i))
    ]
    merges = [
        (piece[:at], piece[at:])
        for piece in sorted(normal, key=lambda piece: -engine.get_score(ids[piece]))
        for at in range(1, len(piece))
        if piece[:at] in normal and piece[at:] in normal
    ]
    rust = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.decoder = decoders.ByteFallback()
    rust.add_special_tokens(["<unk>", "<s>", "</s>"])
    values = metadata(RustTokenizer(rust), 384)
    for text in TEXTS:
        assert merged(text, values) == rust.encode(text).ids, text
    fewer = tokenizers.Tokenizer(models.BPE(ids, merges[1:], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fewer.normalizer, fewer.decoder = rust.normalizer, rust.decoder
    fewer.add_special_tokens(["<unk>", "<s>", "</s>"])
    with pytest.raises(CheckpointError, match="does not merge"):
        metadata(RustTokenizer(fewer), 384)


def test_the_header_is_read_alone(tmp_path: Path, words: Path) -> None:
    checkpoint = a_checkpoint(FAMILIES["gpt_neox"], words)
    to_file(checkpoint, tmp_path / "model.gguf")
    contents = open_gguf(tmp_path / "model.gguf")
    assert contents.metadata["general.name"] == "model"
    value = contents.tensors["token_embd.weight"].read([slice(3, 5), slice(1, 7)])
    assert same_bits(value, checkpoint.model["embed.weight"].read([slice(3, 5), slice(1, 7)]))


def test_the_command(tmp_path: Path, words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from castalia.cli.convert import command
    from castalia.errors import ConfigError

    written(a_checkpoint(ModelConfig(**SIZES | LLAMA | {"mlp_size": 64}), words), tmp_path / "hf", "hf")
    path = tmp_path / "model.gguf"
    command(str(tmp_path / "hf"), path, to="gguf", dtype="q8_0", verify=True, modelfile=True)
    out = capsys.readouterr().out
    assert "weights: 17 of 17 tensors equal" in out
    assert out.endswith('FROM ./model.gguf\nPARAMETER num_ctx 48\nPARAMETER stop "<|endoftext|>"\n')
    reader = gguf.GGUFReader(path)
    assert field(reader, "general.file_type") == 7 and field(reader, "general.quantization_version") == 2
    with pytest.raises(CheckpointError, match="exists already; name another file"):
        command(str(tmp_path / "hf"), path, to="gguf")
    command(str(tmp_path / "hf"), path, to="gguf", dtype="f16", force=True)
    assert field(gguf.GGUFReader(path), "general.file_type") == 1
    command(str(path), tmp_path / "back", to="native")
    assert open_checkpoint(tmp_path / "back").model["embed.weight"].dtype == torch.float16
    with pytest.raises(ConfigError, match="--dtype q8_0 is for --to gguf"):
        command(str(tmp_path / "hf"), tmp_path / "out", to="hf", dtype="q8_0")
    with pytest.raises(ConfigError, match="--modelfile is for --to gguf"):
        command(str(tmp_path / "hf"), tmp_path / "out", to="hf", modelfile=True)
