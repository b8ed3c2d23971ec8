"""Operations of a token: against counted matrix products, and against the original's formula."""

from __future__ import annotations

import pytest

from castalia.config.load import load_config
from castalia.config.schema import ModelConfig
from castalia.plan.flops import (
    executed_flops,
    kv_cache_bytes,
    mean_context,
    neox_flops,
    training_flops,
)


def test_matrix_products_are_those_that_torch_counts() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from castalia.model.transformer import Transformer

    length = 64
    model = ModelConfig(
        num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, mlp_size=96, gated_mlp=True, vocab_size=512,
        norm="rmsnorm", attention_bias=False, mlp_bias=False,
    )  # fmt: skip
    transformer = Transformer(model)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        transformer(torch.zeros(1, length, dtype=torch.long))
    by_op = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in by_op.items() if "attention" not in op)
    attention = 4 * model.num_layers * model.hidden_size * mean_context(length) * length
    norms = 2 * model.num_layers * 2 * model.hidden_size * length  # 2N counts their weights too
    assert training_flops(model, length) / 3 * length == products + attention + norms


def test_attention_sees_half_of_the_sequence_or_its_window() -> None:
    assert mean_context(100) == 50.5
    assert mean_context(100, window=200) == 50.5
    assert mean_context(4, window=1) == (1 + 2 + 2 + 2) / 4


def test_recomputation_costs_a_third_of_the_blocks() -> None:
    model = load_config("pythia-1.4b").model
    assert (
        executed_flops(model, 2048, "none") == executed_flops(model, 2048, "selective") == training_flops(model, 2048)
    )
    assert 1.25 < executed_flops(model, 2048, "full") / training_flops(model, 2048) < 4 / 3


def test_the_originals_formula() -> None:
    model = load_config("gpt-neox-20b").model
    layers, hidden, vocab, length = 44, 6144, 50432, 2048
    by_hand = 72 * layers * hidden**2 * (1 + length / (6 * hidden) + vocab / (16 * layers * hidden))
    assert neox_flops(model, length) == pytest.approx(by_hand)
    assert neox_flops(model, length, recompute=True) == pytest.approx(by_hand * 4 / 3)
    assert 0.95 < training_flops(model, length) / by_hand < 1, "it takes attention as if nothing were masked"


def test_kv_cache() -> None:
    assert kv_cache_bytes(load_config("llama-2-7b").model) == 2 * 32 * 4096 * 2
    grouped = load_config("llama-2-7b", ["model.num_kv_heads=8"]).model
    assert kv_cache_bytes(grouped, element_bytes=4) == 2 * 32 * 8 * 128 * 4
