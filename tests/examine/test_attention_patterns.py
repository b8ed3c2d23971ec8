"""Attention patterns beside transformers' own, and other people's tools on our models: nnsight, TransformerLens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

import castalia
from castalia.checkpoint import convert
from castalia.checkpoint.file_plan import WriteOptions
from castalia.config.schema import ModelConfig
from castalia.examine.attention_patterns import AttentionPatterns
from castalia.examine.residuals import residuals
from castalia.model.init import initialize
from castalia.model.transformer import Transformer
from tests.cli.chat_model import words

SIZES: dict[str, Any] = {"vocab_size": 352, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": 32}
CONFIGS = {
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
    "llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=2),
    "gpt2": lambda: GPT2Config(vocab_size=352, n_embd=32, n_layer=2, n_head=4, n_positions=32),
}
TOKENS = torch.arange(18).reshape(2, 9) * 3


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model in a folder of ours, converted to one of Hugging Face."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "given")
    words().save_pretrained(tmp_path / "given")
    checkpoint = convert.prepare(castalia.open_checkpoint(tmp_path / "given"))
    convert.write(convert.plan_files("hf", checkpoint, WriteOptions()), tmp_path / "hf", "", lambda done: None)
    return tmp_path / "hf"


@torch.no_grad()
def test_patterns_are_those_of_transformers(folder: Path) -> None:
    model, patterns = castalia.load_model(folder), AttentionPatterns()
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")(TOKENS, output_attentions=True)
    torch.testing.assert_close(model(TOKENS, cache=patterns), model(TOKENS), atol=1e-4, rtol=1e-4)
    for layer, attention in enumerate(theirs.attentions):
        torch.testing.assert_close(patterns[layer], attention, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"sliding_window": 4}, {"position": "alibi"}, {"pattern": ("mamba", "attention")}])
def test_models_that_transformers_may_not_have_keep_their_logits(changes: dict[str, Any]) -> None:
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 64, "max_positions": 32}
    cfg = ModelConfig(**(sizes | changes))
    model, patterns = Transformer(cfg).eval(), AttentionPatterns()
    initialize(model, cfg, 1)
    torch.testing.assert_close(model(TOKENS, cache=patterns), model(TOKENS), atol=1e-5, rtol=1e-4)
    seen = patterns[1]
    torch.testing.assert_close(seen.sum(-1), torch.ones(2, 4, 9))
    assert not seen.triu(1).any() and len(patterns.layers) == cfg.attention_layers
    if cfg.sliding_window:
        assert not seen[..., -1, : -1 - cfg.sliding_window].any()


@torch.no_grad()
def test_nnsight_reads_and_changes_what_the_modules_hold(folder: Path) -> None:
    nnsight = pytest.importorskip("nnsight", reason="needs nnsight: pip install castalia[interp]")
    model, patterns = castalia.load_model(folder), AttentionPatterns()
    streams, seen = list(residuals(model, TOKENS)), nnsight.NNsight(model)
    with seen.trace(TOKENS, cache=patterns):
        before = seen.blocks[1].input.save()
        heads = seen.blocks[1].attn.out.input.save()
        attention = seen.blocks[1].attn.output.save()
        neurons = seen.blocks[1].mlp.down.input.save()
        mlp = seen.blocks[1].mlp.output.save()
        after = seen.blocks[1].output.save()
        logits = seen.output.save()
    torch.testing.assert_close(before, streams[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after, streams[2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(before + attention + mlp, after, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.blocks["1"].attn.out(heads), attention)
    torch.testing.assert_close(model.blocks["1"].mlp.down(neurons), mlp)
    torch.testing.assert_close(logits, model(TOKENS), atol=1e-4, rtol=1e-4)
    assert patterns[1].shape == (2, 4, 9, 9)
    with seen.trace(TOKENS):
        seen.blocks[0].mlp.output[:] = 0
        changed = seen.output.save()
    handle = model.blocks["0"].mlp.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    torch.testing.assert_close(changed, model(TOKENS))
    handle.remove()


@pytest.mark.slow
@torch.no_grad()
def test_transformer_lens_opens_a_converted_folder(folder: Path) -> None:
    bridge = pytest.importorskip(
        "transformer_lens.model_bridge", reason="needs transformer-lens: pip install castalia[interp]"
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    lens = bridge.TransformerBridge.boot_transformers(str(folder), hf_model=theirs)
    model, patterns = castalia.load_model(folder), AttentionPatterns()
    logits, found = lens.run_with_cache(TOKENS)
    torch.testing.assert_close(logits, model(TOKENS, cache=patterns), atol=1e-4, rtol=1e-4)
    for layer, stream in enumerate(list(residuals(model, TOKENS))[1:]):
        torch.testing.assert_close(found[f"blocks.{layer}.hook_resid_post"], stream, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[f"blocks.{layer}.attn.hook_pattern"], patterns[layer], atol=1e-5, rtol=1e-4)
