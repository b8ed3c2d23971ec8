"""Every model type of Hugging Face: logits, text and files as transformers has them, and whole cycles of training."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from castalia.checkpoint.convert import plan_files, prepare
from castalia.checkpoint.file_plan import TargetLayout, WriteOptions
from castalia.checkpoint.formats.huggingface.config_json import model_of, read_config, to_config_json
from castalia.checkpoint.formats.huggingface.names import FAMILIES, family_of
from castalia.checkpoint.formats.huggingface.trainer import full_name, groups
from castalia.checkpoint.opener import open_checkpoint
from castalia.config.load import load_config
from castalia.config.schema import ModelConfig
from castalia.data.dataset_writer import DatasetWriter
from castalia.data.tokenizer import train_bpe
from castalia.errors import CastaliaError, CheckpointError
from castalia.generate.generation import generate
from castalia.generate.packed_model import pack
from castalia.language_model import load_model
from castalia.plan.count import count
from castalia.train.loop import train
from tests.checkpoint.hf_families import CASES, USUAL, opened, saved
from tests.checkpoint.made import SIZES, assert_same, made, written

TOKENS = torch.arange(80).view(2, 40) * 7 % 97


class Numbers:
    """A tokenizer whose texts are the ids."""

    vocab_size, eod_id, end_ids, byte_ids = 97, 96, frozenset[int](), frozenset[int]()
    special_texts: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Any) -> str:
        return "".join(f"{id} " for id in ids)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_logits_text_and_files_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    theirs, checkpoint = saved(case, tmp_path / "a"), open_checkpoint(tmp_path / "a")
    ours, expected = load_model(tmp_path / "a"), theirs(TOKENS).logits
    torch.testing.assert_close(ours(TOKENS), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1
    balance = sum(ref.numel() for name, ref in theirs.named_buffers() if name.endswith("e_score_correction_bias"))
    assert count(checkpoint.config.model).total == theirs.num_parameters() + balance

    prompts = [TOKENS[0, :9].tolist(), TOKENS[1, :4].tolist()]
    texts = generate(ours, Numbers(), prompts, max_tokens=12, temperature=0.0)
    for prompt, text in zip(prompts, texts, strict=True):
        asked, options = torch.tensor([prompt]), {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        found = theirs.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=12, **options)
        assert Numbers().encode(text) == found[0, len(prompt) :].tolist()

    pack(ours)
    torch.testing.assert_close(ours(TOKENS), expected, atol=1e-4, rtol=1e-4)

    again = written(checkpoint, tmp_path / "b", "hf")
    assert_same(checkpoint, replace(again, progress=checkpoint.progress))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["model_type"] == CASES[case][0]
    assert torch.equal(opened(tmp_path / "b")(TOKENS).logits, expected)


def test_every_model_type_is_tried() -> None:
    assert set(USUAL) == set(FAMILIES)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_key_that_a_class_reads_is_known(kind: str) -> None:
    config, known = transformers.AutoConfig.for_model(kind), FAMILIES[kind].known
    assert {key for key in config.to_dict() if key[0] != "_"} | config.attribute_map.keys() <= known
    code = inspect.getsource(importlib.import_module(f"transformers.models.{kind}.modeling_{kind}"))
    read = set(re.findall(r"config\.([a-z]\w+)", code)) | set(re.findall(r'getattr\([a-z.]*config, "(\w+)"', code))
    of_other_classes = {"hidden_dropout"} if kind == "gpt2" else set()  # that which labels tokens
    assert read - known - set(config.attribute_map.values()) <= of_other_classes and read & known


@pytest.mark.parametrize("kind", USUAL)
def test_unknown_keys_are_named_and_no_others(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    assert open_checkpoint(tmp_path).notes == ()
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    more: dict[str, Any] = {"a_new_norm": True, "not_used": None, "use_more": False}
    if "rope_scaling" in FAMILIES[kind].keys:
        more["rope_parameters"] = (config.get("rope_parameters") or {"rope_type": "default"}) | {"turns": [1, 2]}
    file.write_text(json.dumps(config | more))
    (note,) = open_checkpoint(tmp_path).notes
    named = "a_new_norm=True, rope_parameters.turns=[1, 2]" if "rope_parameters" in more else "a_new_norm=True"
    assert note.startswith(f"{named} of config.json means nothing that we know of in a {kind} model: ")


@pytest.mark.parametrize("case", [case for case in CASES if any(FAMILIES[CASES[case][0]].modules)])
def test_the_trainers_order_is_that_of_the_class(case: str, tmp_path: Path) -> None:
    model, family = saved(case, tmp_path), FAMILIES[CASES[case][0]]
    decaying, others = groups(family, open_checkpoint(tmp_path).config.model)
    names = [name for name, _ in model.named_parameters()]
    for group in (decaying, others):
        known = {full_name(family, name) for name in group}
        assert [full_name(family, name) for name in group] == [name for name in names if name in known]
    assert len(decaying) + len(others) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_a_whole_cycle(case: str, lora: bool, tmp_path: Path) -> None:
    """Opened, trained for three steps, saved, resumed, converted back, and opened by transformers."""
    saved(case, tmp_path / "base", vocab_size=300)
    train_bpe(["the light was good and there was evening and there was morning " * 20], 300).save(tmp_path / "base")
    tokenizer = (tmp_path / "base" / "tokenizer.json").read_bytes()
    with DatasetWriter(tmp_path / "corpus", "uint16") as writer:
        for document in range(30):
            writer.add([(7 * document + 3 * place) % 257 for place in range(40)])
    source = [f"data.path={tmp_path / 'corpus'}", "data.split=9,1,0", "data.seq_length=24", "precision.compute=fp32"]
    options = ["train.batch_size=2", "optimizer.lr=0.01", "log.peak_tflops=0.1", "eval.batches=1"]
    tuned = ["finetune.lora.rank=4"] if lora else []
    start = [f"checkpoint.init_from={tmp_path / 'base'}", f"checkpoint.dir={tmp_path / 'run'}", "train.steps=3"]
    run = train(load_config([], [*source, *options, *start, *tuned]))
    trained = open_checkpoint(run)
    assert trained.progress.step == 3
    written(trained, tmp_path / "out", "hf")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer
    with torch.no_grad():
        expected = load_model(run)(TOKENS)
        torch.testing.assert_close(opened(tmp_path / "out")(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(load_model(tmp_path / "base")(TOKENS), expected, atol=1e-3)
    if not lora:
        assert_same(trained, open_checkpoint(tmp_path / "out"))


@pytest.mark.parametrize(
    "case, changes, message",
    [
        ("llama", {"is_causal": False}, "is_causal=False is not supported"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder=True is not supported"),
        ("llama", {"pruned_heads": {"0": [1]}}, "pruned_heads={.*} is not supported"),
        ("qwen2", {"vocab_size": None}, "vocab_size is null"),
        ("llama", {"vocab_size": None}, "vocab_size is null"),
        ("qwen2", {"head_dim": 12}, "head_dim=12 is not supported; only None or 8"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "layer_types has 'chunked_attention'"),
        ("qwen2 windows", {"layer_types": ["chunked_attention"] * 4}, "layer_types has 'chunked_attention'"),
        ("qwen2 windows", {"layer_types": ["full_attention"] * 3}, "layer_types names 3 blocks, of which there are 4"),
        ("qwen2 windows", {"sliding_window": 1}, "sliding_window=1 is not supported"),
        ("qwen3", {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu' is not supported"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("gemma", {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu' is not supported"),
        ("olmo2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic'"),
        ("stablelm", {"hidden_dropout": 0.1}, "hidden_dropout=0.1 is not supported"),
        ("smollm3", {"no_rope_layers": [1, 2, 0, 1]}, "no_rope_layers has 2"),
        ("gpt_neo", {"attention_types": [[["sparse"], 4]]}, "attention_types has 'sparse'"),
        ("gpt_neo", {"attention_types": [4]}, "attention_types is no list"),
        ("gpt_neo", {"attention_types": [[["global"], 10**12]]}, r"attention_types names \d blocks"),
        ("smollm3", {"num_hidden_layers": 10**11, "layer_types": None}, "num_hidden_layers=10{11} is"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False is not supported"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim=16 is not supported"),
        ("opt", {"enable_bias": False}, "enable_bias=False is not supported"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True is not supported"),
        ("phi", {"tie_word_embeddings": True}, "tie_word_embeddings=True is not supported"),
        ("gptj", {"rotary_dim": 12}, "rotary_dim=12 is not supported; only 2 or 4 or 6 or 8"),
        ("gptj", {"rotary_dim": None}, "rotary_dim=None is not supported"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "post_layernorm=True is not supported"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not supported"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported"),
        ("olmoe", {"num_experts_per_tok": 7}, "num_experts_per_tok=7 is more than num_experts=6"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] are not supported: the blocks with experts"),
        ("qwen2_moe", {"mlp_only_layers": [3]}, "must be at one distance up to the last block"),
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "mlp_only_layers leave no block with experts"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size"),
        ("qwen2_moe with windows, every other block", {"sliding_window": 0}, "sliding_window=0 is not supported"),
        ("qwen2_moe", {"use_sliding_window": True, "layer_types": None}, "use_sliding_window needs layer_types"),
        ("qwen3_moe", {"decoder_sparse_step": 5}, "decoder_sparse_step=5 and mlp_only_layers leave no block"),
        ("qwen3_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers has '0', which is no number of a block"),
        ("glm4_moe", {"n_group": 2}, "n_group=2 is not supported; only 1"),
        ("glm4_moe", {"topk_group": 2}, "topk_group=2 is not supported; only 1"),
        ("glm4_moe", {"first_k_dense_replace": 4}, "first_k_dense_replace=4 leaves no block with experts"),
        ("glm4_moe", {"n_shared_experts": 0}, "n_shared_experts"),
        ("qwen3_moe", {"num_experts": 1, "num_experts_per_tok": 1}, "not a usable config"),
    ],
)
def test_what_a_class_can_and_we_cannot_is_refused_by_name(
    case: str, changes: dict, message: str, tmp_path: Path
) -> None:
    saved(case, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_what_predicts_further_tokens_is_left_out_and_named(tmp_path: Path) -> None:
    theirs = saved("glm4_moe", tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    more = {
        name.replace(".3.", ".4.", 1): ref.clone() for name, ref in stored.items() if name.startswith("model.layers.3.")
    }
    save_file(stored | more | {"model.layers.4.eh_proj.weight": torch.zeros(32, 64)}, file, {"format": "pt"})
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    (note,) = open_checkpoint(tmp_path).notes
    assert note.startswith(f"num_nextn_predict_layers=1: {len(more) + 1} tensors of what predicts the tokens after")
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)(TOKENS), theirs(TOKENS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", range(1, 7))
def test_blocks_with_experts_come_back_from_qwens_keys(layers: int, tmp_path: Path) -> None:
    for first in range(layers):
        for every in range(1, layers + 1):
            wanted = {"count": 2, "gated": True, "first": first, "every": every, "width": 8}
            plain = {"norm": "rmsnorm", "gated_mlp": True, "mlp_bias": False, "qk_norm": "head", "vocab_size": 8}
            model = ModelConfig(num_layers=layers, hidden_size=8, num_heads=2, experts=wanted, **plain)
            assert family_of(model, "") == "qwen3_moe"
            config = to_config_json("qwen3_moe", model, 8, {})
            (tmp_path / "config.json").write_text(json.dumps(config))
            assert model_of(read_config(tmp_path / "config.json")).layer_kinds == model.layer_kinds
            theirs = transformers.Qwen3MoeConfig(**config)
            mixed = [
                layer not in theirs.mlp_only_layers and (layer + 1) % theirs.decoder_sparse_step == 0
                for layer in range(layers)
            ]
            assert mixed == [kind == "moe" for kind in model.layer_kinds]


RMS = {"norm": "rmsnorm"}
OPTIONS: dict[str, dict[str, Any]] = {  # of models that GPT-NeoX, Megatron and llama.cpp have no equal of
    "head_dim": {"head_dim": 12},
    "rotary_pattern": {"rotary_pattern": [True, False]},
    "position_offset": {"position": "learned", "position_offset": 3},
    "zero_centered_norms": RMS | {"zero_centered_norms": True},
    "norm_placement": {"norm_placement": "both"},
    "qk_norm": {"qk_norm": "width"},
    "attention_out_bias": {"attention_out_bias": False},
    "attention_scale": {"attention_scale": 1.0},
    "clip_qkv": {"clip_qkv": 8.0},
    "window_pattern": {"sliding_window": 5, "window_pattern": [True, False]},
    "embedding_norm": {"embedding_norm": True},
    "embedding_multiplier": {"embedding_multiplier": 4.0},
    "head_bias": {"head_bias": True},
    "attention_softcap": {"attention_softcap": 2.0},
    "logit_softcap": {"logit_softcap": 3.0},
}


@pytest.mark.parametrize("form", ["hf", "neox", "megatron-deepspeed", "gguf"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_format_that_cannot_say_an_option_names_it(name: str, form: str, tmp_path: Path) -> None:
    model = made(ModelConfig(**SIZES, **OPTIONS[name]), optimizer=False)
    layout = TargetLayout() if form in ("neox", "megatron-deepspeed") else None
    with pytest.raises(CastaliaError, match=name):
        plan_files(form, prepare(model), WriteOptions(layout=layout) if layout else WriteOptions())
