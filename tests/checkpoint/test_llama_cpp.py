"""GGUF files in llama.cpp itself: logits, token ids and greedy text beside ours. For `make campaign`.

    pip install llama-cpp-python      # compiles llama.cpp for some minutes
    pytest -m campaign -s tests/checkpoint/test_llama_cpp.py

llama.cpp takes the values of GELU from a table in fp16, so that logits of models with GELU differ by some thousandths;
attention and keys and values are set to fp32.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers

from castalia.checkpoint import convert
from castalia.checkpoint.file_plan import WriteOptions
from castalia.checkpoint.formats.gguf.gguf_vocabulary import LLAMA3, QWEN2
from castalia.config.schema import ModelConfig, RopeScaling, TokenizerConfig
from castalia.data.tokenizer import RustTokenizer, SentencePieceTokenizer, load_tokenizer
from castalia.language_model import load_model
from tests.checkpoint.made import LLAMA, made, written
from tests.checkpoint.test_gguf import TEXTS, split

pytestmark = pytest.mark.campaign

HARD = [
    *TEXTS, "<|endoftext|>and <tool>more", "I'LL don't  \r\n\r\n can't —“quoted” __init__(self): {}[]",
    "½ ² 12 345678 x9y", "مرحبا بالعالم שלום мир été", "  leading, trailing  ",
]  # fmt: skip
PROBE, PROMPT, NEW = 200, 8, 48  # tokens
BASE: dict[str, Any] = {
    "num_layers": 3, "hidden_size": 128, "num_heads": 4, "max_positions": 256, "vocab_size": 1003, "vocab_multiple": 64,
}  # fmt: skip
NEOX: dict[str, Any] = BASE | {"rotary_pct": 0.25, "parallel_residual": True}
GATED: dict[str, Any] = BASE | LLAMA | {"mlp_size": 320}
GEMMA: dict[str, Any] = GATED | {
    "zero_centered_norms": True, "embedding_multiplier": 128**0.5, "activation": "gelu_tanh", "head_dim": 48,
    "tie_embeddings": True,
}  # fmt: skip
MODELS: dict[str, tuple[ModelConfig, str]] = {
    "gpt_neox": (ModelConfig(**NEOX), "gpt-2"),
    "gpt_neox, exact GELU": (ModelConfig(**NEOX, activation="gelu"), "gpt-2"),
    "gpt_neox, sequential, tied": (ModelConfig(**BASE, rotary_pct=0.5, tie_embeddings=True, norm_eps=1e-6), "smollm"),
    "gpt_neox, no biases, grouped, linear": (
        ModelConfig(
            **NEOX, attention_bias=False, mlp_bias=False, num_kv_heads=2,
            rope_scaling=RopeScaling(kind="linear", factor=4),
        ),
        "qwen2",
    ),
    "gpt_neox, vocabulary of the 20B": (ModelConfig(**NEOX | {"vocab_size": 50277, "vocab_multiple": 128}), "20B"),
    "gpt2": (ModelConfig(**BASE, position="learned", tie_embeddings=True), "gpt-2"),
    "gpt2, untied": (ModelConfig(**BASE, position="learned"), "dbrx"),
    "llama": (ModelConfig(**GATED, rotary_base=5e5), "sentencepiece"),
    "llama, tied": (ModelConfig(**GATED, norm_eps=1e-6, tie_embeddings=True), "sentencepiece as json"),
    "llama, biases": (
        ModelConfig(**GATED | {"attention_bias": True, "mlp_bias": True, "num_kv_heads": None}), "llama-bpe",
    ),
    "llama, linear": (ModelConfig(**GATED, rope_scaling=RopeScaling(kind="linear", factor=4)), "llama-bpe"),
    "llama, YaRN": (
        ModelConfig(**GATED, rope_scaling=RopeScaling(kind="yarn", factor=4, original_positions=64)), "llama-bpe",
    ),
    "llama, YaRN with a factor": (
        ModelConfig(
            **GATED, rope_scaling=RopeScaling(kind="yarn", factor=4, original_positions=64, attention_factor=1.3)
        ),
        "llama-bpe",
    ),
    "llama, Llama 3": (
        ModelConfig(**GATED, rope_scaling=RopeScaling(kind="llama3", factor=8, original_positions=64)), "llama-bpe",
    ),
    "qwen2": (ModelConfig(**GATED | {"attention_bias": True, "attention_out_bias": False}), "qwen2"),
    "qwen3": (ModelConfig(**GATED, qk_norm="head", head_dim=48, tie_embeddings=True), "qwen2"),
    "gemma": (ModelConfig(**GEMMA), "qwen2"),
    "gemma2": (
        ModelConfig(
            **GEMMA, norm_placement="both", attention_softcap=5.0, logit_softcap=9.0, sliding_window=63,
            window_pattern=(True, False),
        ),
        "qwen2",
    ),
    "olmo": (ModelConfig(**GATED | {"norm": "layernorm_no_params"}, clip_qkv=2.0), "gpt-2"),
    "olmo2": (ModelConfig(**GATED, norm_placement="after", qk_norm="width"), "dbrx"),
    "smollm3": (
        ModelConfig(**GATED | {"num_layers": 5}, rotary_pattern=(True, True, True, False), tie_embeddings=True),
        "llama-bpe",
    ),
    "stablelm": (ModelConfig(**GATED | {"norm": "layernorm"}, rotary_pct=0.25, attention_out_bias=False), "gpt-2"),
    "stablelm, parallel": (
        ModelConfig(
            **GATED | {"norm": "layernorm"}, rotary_pct=0.25, parallel_residual=True, shared_norm=True,
            qk_norm="each_head",
        ),
        "gpt-2",
    ),
    "phi2": (ModelConfig(**NEOX, shared_norm=True, head_bias=True), "gpt-2"),
    "phi2 of GPT-J": (ModelConfig(**NEOX, shared_norm=True, head_bias=True, attention_bias=False), "gpt-2"),
    "bloom": (ModelConfig(**BASE, position="alibi", embedding_norm=True, tie_embeddings=True), "gpt-2"),
    "llama, bytes": (ModelConfig(**GATED | {"vocab_size": 257}), "bytes"),
}  # fmt: skip


@pytest.fixture(scope="module")
def library() -> Any:
    return pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which compiles for minutes")


def byte_level(folder: Path, pre: Any, ignore_merges: bool = False) -> TokenizerConfig:
    engine = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    engine.pre_tokenizer, engine.decoder = pre, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    engine.train_from_iterator(the_text(), trainer)
    engine.add_tokens(["  ", "    ", "<tool>"])
    RustTokenizer(engine).save(folder)
    return TokenizerConfig(path=str(folder))


def the_text() -> list[str]:
    return Path("examples/kjv/kjv.jsonl").read_text()[:200_000].split("\\n")


def sentencepiece_model(folder: Path) -> TokenizerConfig:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder.mkdir()
    (folder / "text.txt").write_text("\n".join(line.replace("\n", " ")[:4000] for line in the_text()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=1000, model_type="bpe",
        byte_fallback=True, character_coverage=0.999, normalization_rule_name="identity", num_threads=1,
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return TokenizerConfig(path=str(folder / "tokenizer.model"))


def as_json(config: TokenizerConfig, folder: Path) -> TokenizerConfig:
    """The tokenizer.json that transformers makes of a SentencePiece model."""
    source = load_tokenizer(config)
    assert isinstance(source, SentencePieceTokenizer)
    engine = source.engine
    ids = {engine.id_to_piece(i): i for i in range(engine.vocab_size())}
    normal = {
        text for text, i in ids.items() if not (engine.is_control(i) or engine.is_byte(i) or engine.is_unknown(i))
    }
    merges = [
        (text[:at], text[at:])
        for text in sorted(normal, key=lambda text: -engine.get_score(ids[text]))
        for at in range(1, len(text))
        if text[:at] in normal and text[at:] in normal
    ]
    rust = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    rust.add_special_tokens(["<unk>", "<s>", "</s>"])
    RustTokenizer(rust).save(folder)
    return TokenizerConfig(path=str(folder))


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory, fixtures: Path) -> dict[str, TokenizerConfig]:
    folder = tmp_path_factory.mktemp("tokenizers")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    pieces = sentencepiece_model(folder / "sentencepiece")
    return {
        "gpt-2": byte_level(folder / "gpt2", words),
        "smollm": byte_level(folder / "smollm", digits),
        "llama-bpe": byte_level(folder / "llama3", split(LLAMA3), True),
        "dbrx": byte_level(folder / "dbrx", split(LLAMA3)),
        "qwen2": byte_level(folder / "qwen2", split(QWEN2)),
        "sentencepiece": pieces,
        "sentencepiece as json": as_json(pieces, folder / "json"),
        "20B": TokenizerConfig(path=str(fixtures / "tokenizer" / "20B_tokenizer.json")),
        "bytes": TokenizerConfig(kind="bytes"),
    }


@pytest.mark.parametrize("name", MODELS)
def test_logits_ids_and_text(name: str, library: Any, tokenizer_of: dict[str, TokenizerConfig], tmp_path: Path) -> None:
    config, words = MODELS[name]
    checkpoint = made(config, 3, optimizer=False, scale=2.0)
    assert checkpoint.config is not None
    settings = tokenizer_of[words]
    checkpoint = replace(checkpoint, config=checkpoint.config.with_({"tokenizer": settings}))
    written(checkpoint, tmp_path / "native", "native")
    model = load_model(str(tmp_path / "native")).eval()
    tokens = torch.randint(min(config.vocab_size or 0, 1000), (1, PROBE), generator=torch.Generator().manual_seed(1))
    text = tokens[:, :PROMPT]
    with torch.no_grad():
        ours = model(tokens)[0].numpy()
        for _ in range(NEW):
            text = torch.cat((text, model(text)[:, -1].argmax(-1, keepdim=True)), 1)
    for kind in ("f32", "f16", "bf16", "q8_0"):
        path = tmp_path / f"{kind}.gguf"
        plan = convert.plan_files("gguf", convert.prepare(checkpoint), WriteOptions(gguf_type=kind))
        convert.write(plan, path, "mark", lambda count: None)
        there = library.Llama(
            str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0, flash_attn=False
        )
        there.eval(tokens[0].tolist())
        theirs = np.array(there.scores[:PROBE])
        difference, agree = np.abs(ours - theirs).max(), (ours.argmax(1) == theirs.argmax(1)).mean()
        print(
            f"\n{name}, {kind}: max |Δlogit| {difference:.1e} of {np.abs(ours).max():.1f}, likeliest {agree:.1%}",
            end="",
        )
        if kind != "f32":
            continue
        # A difference of GELU's size may decide between two tokens that are nearly as likely.
        assert difference < (1e-3 if config.activation == "silu" else 5e-2)
        assert agree == 1 if config.activation == "silu" else agree >= 0.99
        there.reset()
        greedy = text[0, :PROMPT].tolist()
        there.eval(greedy)
        for _ in range(NEW):
            greedy.append(int(there.scores[there.n_tokens - 1].argmax()))
            there.eval(greedy[-1:])
        assert greedy == text[0].tolist()
        tokenizer = load_tokenizer(settings)
        for each in HARD:
            assert there.tokenize(each.encode(), add_bos=True, special=True) == tokenizer.encode(each), each
        print(f", greedy text equal, ids of {len(HARD)} texts equal", end="")
