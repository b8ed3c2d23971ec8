import pytest
import torch

from castalia.config.schema import ModelConfig, MuPConfig, OptimizerConfig
from castalia.errors import ConfigError
from castalia.model.init import initialize
from castalia.model.transformer import Transformer
from castalia.tune.mup_check import MAX_SLOPE, at_width, coordinate_check, judge, slopes

SMALL = ModelConfig(num_layers=2, hidden_size=64, num_heads=4, vocab_size=128, vocab_multiple=1, mup=MuPConfig())
WIDTHS = [64, 128, 256]


@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [
        (OptimizerConfig(lr=0.005), {}),
        (OptimizerConfig(lr=0.001, name="lion"), {"init_method": "small_init", "output_init_method": "wang_init"}),
        (OptimizerConfig(lr=0.005), {"tie_embeddings": True, "parallel_residual": True, "num_kv_heads": 2}),
    ],
    ids=["adamw", "lion", "tied"],
)
def test_activations_move_alike_at_every_width(optimizer, changes):
    cfg = SMALL.model_copy(update=changes)
    flat = slopes(WIDTHS, coordinate_check(cfg, optimizer, WIDTHS, mup=True))
    steep = slopes(WIDTHS, coordinate_check(cfg, optimizer, WIDTHS, mup=False))
    assert flat.keys() == {"embed", "blocks.0", "blocks.1", "logits"}
    assert all(-0.5 < slope < MAX_SLOPE for slope in flat.values()), flat
    assert all(steep[name] > 0.4 for name in ("blocks.0", "blocks.1", "logits")), steep


def test_the_verdict_depends_on_the_parametrization_of_the_config():
    flat, steep = {"embed": 0.0, "logits": -0.4}, {"embed": 0.1, "logits": 0.9}
    assert judge(flat, True, 256) == (True, "carries over: nothing grows with the width; rates are those of width 256")
    assert "these do: logits like width^0.90" in judge(steep, True, 256).words
    assert not judge(steep, True, 256).carries_over and not judge(steep, False, 256).carries_over
    assert "model.mup.base_width=256" in judge(steep, False, 256).words
    assert judge(flat, False, 256).carries_over


def test_slopes_are_exponents():
    assert slopes([4, 16, 64], {"a": [1.0, 2.0, 4.0], "b": [3.0, 3.0, 3.0]}) == pytest.approx({"a": 0.5, "b": 0.0})


def test_other_widths_keep_the_heads_and_the_shape():
    wide = at_width(SMALL.model_copy(update={"num_kv_heads": 2, "mlp_size": 96}), 256, mup=True)
    assert (wide.head_size, wide.num_heads, wide.kv_heads, wide.mlp_width) == (16, 16, 8, 384)
    assert wide.width_multiplier == 4.0
    assert at_width(SMALL, 256, mup=False).width_multiplier == 1.0
    with pytest.raises(ConfigError, match="width 100: heads of 16 allow multiples of 16"):
        at_width(SMALL, 100, mup=True)


def test_initial_deviations_shrink_inside_the_blocks_alone():
    for method, ratio in (("normal", 1.0), ("small_init", 1.0)):
        cfg = SMALL.model_copy(update={"init_method": method})
        matrices = {}
        for width in (64, 256):
            model = Transformer(wide := at_width(cfg, width, mup=True))
            initialize(model, wide, seed=1)
            matrices[width] = {name: p.std().item() for name, p in model.named_parameters() if p.ndim == 2}
        for name, expected in (("embed.weight", ratio), ("head.weight", ratio), ("blocks.0.attn.qkv.weight", 0.5)):
            assert matrices[256][name] / matrices[64][name] == pytest.approx(expected, rel=0.05), (method, name)


def test_multipliers_and_temperatures():
    """Each factor of a muP model against the plain model with that factor worked into its weights."""
    tokens = torch.randint(128, (2, 9), generator=torch.Generator().manual_seed(0))
    plain = SMALL.model_copy(update={"mup": None, "position": "learned", "max_positions": 16})
    factors = MuPConfig(
        base_width=16,
        embedding_multiplier=3.0,
        position_multiplier=0.5,
        attention_temperature=2.0,
        output_temperature=1.5,
    )
    ours, expected = Transformer(plain.model_copy(update={"mup": factors})), Transformer(plain)
    for model in (ours, expected):
        initialize(model, plain, seed=1)
    with torch.no_grad():
        expected.embed.weight *= 3.0
        expected.positions.weight *= 1.5
        expected.head.weight /= 4 * 1.5
        for block in expected.blocks.values():  # 1 / (16 * 2) instead of 1 / sqrt(16)
            heads = block.attn.qkv.weight.view(4, 3, 16, 64)
            heads[:, 0] *= 4 / 32
    torch.testing.assert_close(ours(tokens), expected(tokens), atol=1e-5, rtol=1e-4)
