"""gMLP and aMLP: the original's logits, causality, texts token by token, initial values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from castalia.checkpoint.formats.neox import read as neox_read
from castalia.config.schema import ModelConfig
from castalia.errors import ConfigError
from castalia.loading import build_model
from castalia.model.init import initialize, seeded_tensor
from castalia.model.init_kinds import torch_linear
from castalia.model.transformer import Transformer
from tests.model.mixers import require_causal, require_same_token_by_token

SIZES = {"num_layers": 3, "hidden_size": 16, "num_heads": 2, "vocab_size": 64, "vocab_multiple": 1, "max_positions": 24}
PATTERN = ("gmlp", "attention", "amlp")


def made(**settings):
    cfg = ModelConfig(**{**SIZES, "pattern": PATTERN, "amlp_size": 8, "init_std": 0.4, **settings})
    model = Transformer(cfg)
    initialize(model, cfg, 1)
    for name, parameter in model.named_parameters():
        if "spatial" in name:  # begins with 0 and 1, which would hide faults
            torch.nn.init.normal_(parameter.data, std=0.3)
    return model.eval()


@pytest.mark.parametrize("variant", ["gmlp-fp32", "amlp-fp32"])
def test_the_originals_logits_come_out(variant, fixtures):
    folder = fixtures / "neox-kinds" / variant
    expected = np.load(folder / "expected_logits.npz")
    model = build_model(neox_read.read(folder / "checkpoint" / "global_step5")).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(expected["input_ids"])).numpy()
        assert np.abs(logits - expected["logits"]).max() < 1e-5
        model.blocks["1"].gmlp.spatial.weight.zero_()
        assert np.abs(model(torch.from_numpy(expected["input_ids"])).numpy() - expected["logits"]).max() > 0.01


def test_a_token_changes_nothing_before_it_and_something_after():
    require_causal(made())


def test_texts_token_by_token_equal_whole_sequences_also_beside_shorter_ones():
    require_same_token_by_token(made(), [9, 3, 5])


@torch.no_grad()
def test_a_sequence_longer_than_the_spatial_matrix_is_refused():
    model = made(pattern=("gmlp",))
    with pytest.raises(ConfigError, match=r"25 tokens is longer than model\.max_positions=24"):
        model(torch.zeros(1, 25, dtype=torch.long))


def test_the_original_never_adds_two_biases_which_get_gradients_of_zero():
    model = made().train()
    model(torch.arange(20)[None] % 7).square().mean().backward()
    for part in ("up", "down"):
        bias = model.get_parameter(f"blocks.0.gmlp.{part}.bias")
        assert bias.grad is not None and not bias.grad.any()
    assert model.get_parameter("blocks.0.gmlp.spatial.weight").grad.triu(1).abs().max() == 0


def test_seeded_values_of_torch_like_modules_are_bounded_and_the_same_in_slices():
    cfg = ModelConfig(**SIZES, pattern=PATTERN, amlp_size=8)
    name, shape = "blocks.2.gmlp.attn.out.weight", (64, 8)
    whole = seeded_tensor(cfg, 0, name, shape)
    assert 0.9 < whole.abs().max() * 8**0.5 <= 1
    assert torch.equal(seeded_tensor(cfg, 0, name, shape, (slice(8, 20), slice(0, 8))), whole[8:20])
    bias = seeded_tensor(cfg, 0, "blocks.2.gmlp.attn.out.bias", (64,))
    assert bias.shape == (64,) and 0.9 < bias.abs().max() * 8**0.5 <= 1
    assert torch.equal(seeded_tensor(cfg, 0, "blocks.2.gmlp.attn.out.bias", (64,), (slice(3, 9),)), bias[3:9])


def test_linear_maps_are_drawn_as_torch_draws_them():
    torch.manual_seed(5)
    theirs = torch.nn.Linear(37, 11)
    weight, bias = torch_linear(11, 37, torch.Generator().manual_seed(5))
    assert torch.equal(weight, theirs.weight) and torch.equal(bias, theirs.bias)
