"""The table of tensors against the model itself, and its columns by examples."""

from __future__ import annotations

from typing import get_args

import pytest

from castalia.config.schema import LoraConfig, LoraTarget, ModelConfig
from castalia.config.tensor_table import ROWS, adapter_shapes, row_of, tensor_shapes, tp_dim
from castalia.errors import ConfigError

SWIGLU = {"norm": "rmsnorm", "gated_mlp": True, "activation": "silu", "attention_bias": False}
VARIANTS = {
    "neox": {"parallel_residual": True, "rotary_pct": 0.25},
    "sequential": {},
    "shared norm": {"parallel_residual": True, "shared_norm": True},
    "shared norm that nothing shares": {"parallel_residual": False, "shared_norm": True},
    "gpt2": {"position": "learned", "tie_embeddings": True},
    "llama": SWIGLU | {"mlp_bias": False, "num_kv_heads": 2, "mlp_size": 24},
    "qk norm": {"qk_norm": True},
    "scalenorm": {"norm": "scalenorm"},
    "no parameters in norms": {"norm": "layernorm_no_params"},
    "reward model": {"reward_head": True},
    "head with a bias": {"head_bias": True, "parallel_residual": True, "shared_norm": True},
    "reward model of one with a bias": {"head_bias": True, "reward_head": True},
    "four norms and caps": SWIGLU | {"norm_placement": "both", "attention_softcap": 2.0, "logit_softcap": 3.0},
    "alibi": {"position": "alibi", "attention_bias": False},
    "experts": {"experts": {"count": 3, "width": 24, "gated": True}},
    "gMLP and aMLP": {"pattern": ("gmlp", "amlp"), "amlp_size": 8, "norm": "scalenorm"},
    "Mamba": {"pattern": ("mamba", "attention"), "norm": "rmsnorm"},
    "RWKV": {"pattern": ("rwkv", "attention"), "norm": "rmsnorm", "embedding_norm": True},
    "RWKV of other sizes": {"pattern": ("rwkv",), "rwkv": {"width": 24, "mix_rank": 4, "decay_rank": 3}},
    "Mamba of other sizes": {
        "pattern": ("mamba",),
        "mamba": {"width": 24, "states": 4, "taps": 3, "rank": 5, "conv_bias": False, "linear_bias": True},
    },
    "aMLP and experts": {"pattern": ("attention", "amlp"), "amlp_size": 8, "experts": {"count": 3}, "qk_norm": True},
    "balanced experts after a dense block, beside a shared one": {
        "experts": {"count": 3, "first": 1, "gated": True, "router": "balanced", "shared_width": 8, "shared_gate": True}
    },
    "experts in every second block": {"experts": {"count": 3, "every": 2}, "gated_mlp": True},
}


@pytest.mark.parametrize("choices", VARIANTS.values(), ids=VARIANTS)
def test_the_model_on_the_meta_device_has_exactly_these_tensors(choices) -> None:
    import torch

    from castalia.model.transformer import Transformer

    model = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, vocab_size=100, max_positions=16, **choices)
    with torch.device("meta"):
        real = {name: tuple(p.shape) for name, p in Transformer(model).named_parameters()}
    assert tensor_shapes(model) == real


def test_tensor_parallel_cuts() -> None:
    assert tp_dim("blocks.3.attn.qkv.bias") == tp_dim("embed.weight") == tp_dim("blocks.0.mlp.gate.weight") == 0
    assert tp_dim("blocks.0.attn.out.weight") == tp_dim("blocks.0.mlp.down.weight") == 1
    assert (tp_dim("blocks.0.attn.qkv.lora_a"), tp_dim("blocks.0.attn.qkv.lora_b")) == (None, 0)
    assert (tp_dim("blocks.0.mlp.down.lora_a"), tp_dim("blocks.0.mlp.down.lora_b")) == (1, None)
    assert tp_dim("blocks.0.attn.out.bias") is tp_dim("blocks.0.norm1.weight") is tp_dim("positions.weight") is None


def test_an_unknown_name_claims_nothing() -> None:
    row = row_of("optimizer.queue.weight")
    assert (row.kind, row.tp_dim, row.has_token_rows, row.row_parallel_bias) == (None, None, False, False)


def test_biases_that_tensor_ranks_hold_copies_of() -> None:
    model = ModelConfig(num_layers=1, hidden_size=32, num_heads=4, vocab_size=100, qk_norm=True, gated_mlp=True)
    found = [name for name in tensor_shapes(model) if row_of(name).row_parallel_bias]
    assert found == ["blocks.0.attn.out.bias", "blocks.0.mlp.down.bias"]


def test_linear_maps_of_every_kind_of_block_are_adapted() -> None:
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 100, "max_positions": 16}
    for kind, matrices in (("attention", 4), ("gmlp", 2), ("amlp", 4), ("mamba", 5), ("rwkv", 8)):
        shapes = adapter_shapes(ModelConfig(**sizes, pattern=(kind,)), LoraConfig(rank=2))
        assert len(shapes) == 2 * 2 * matrices, kind
    mixed, named = ModelConfig(**sizes, pattern=("mamba", "attention")), LoraConfig(rank=2, targets=("mamba.out",))
    assert {name.rpartition(".")[0] for name in adapter_shapes(mixed, named)} == {"blocks.0.mamba.out"}
    with pytest.raises(ConfigError, match="the model has no rwkv.time.key; it has mamba.in_x"):
        adapter_shapes(mixed, LoraConfig(targets=("rwkv.time.key",)))


def test_each_matrix_that_takes_an_adapter_can_be_named() -> None:
    assert set(get_args(LoraTarget)) == {row.module for row in ROWS if row.adaptable}
    experts = {"count": 4, "width": 16, "shared_width": 24}
    model = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, vocab_size=100, experts=experts)
    found = adapter_shapes(model, LoraConfig(rank=2, targets=("mlp.shared.down",)))
    assert set(found.values()) == {(2, 24), (32, 2)} and len(found) == 4
