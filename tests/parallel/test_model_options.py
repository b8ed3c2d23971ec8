"""Models with the options of Gemma 2, OLMo 2, SmolLM3 and Phi train in every layout as in one process.

The epsilon of Adam is 1e-4: with 1e-8 gradients that are nearly zero, of which these models have more than others,
would make whole steps of the last bits in which layouts differ.
"""

import pytest

from castalia.errors import ConfigError
from castalia.parallel.rank_grid import check_run
from tests.parallel.test_layouts import LAYOUTS, alone, assert_equal  # noqa: F401 - a fixture
from tests.parallel.training import train_steps

pytestmark = pytest.mark.xdist_group("pool")
GATED = [
    *("model.norm=rmsnorm", "optimizer.eps=1e-4", "model.gated_mlp=true", "model.num_kv_heads=2"),
    *("model.attention_bias=false", "model.mlp_bias=false"),
]
OPTIONS = {
    "gemma 2": [
        *GATED,
        *("model.zero_centered_norms=true", "model.norm_placement=both", "model.head_dim=12", "model.sliding_window=5"),
        *("model.window_pattern=[true, false]", "model.embedding_multiplier=5.657", "model.attention_scale=0.4"),
        *("model.attention_softcap=1.0", "model.logit_softcap=2.0", "model.tie_embeddings=true"),
    ],
    "olmo 2": [
        *GATED,
        *("model.norm_placement=after", "model.qk_norm=width", "model.clip_qkv=0.5", "model.norm_eps=1e-4"),
        "optimizer.lr=0.0003",
    ],
    "smollm 3": [*GATED, "model.rotary_pattern=[true, true, true, false]", "model.tie_embeddings=true"],
    "phi": [
        *("optimizer.eps=1e-4", "model.parallel_residual=true", "model.shared_norm=true", "model.rotary_pct=0.5"),
        *("model.qk_norm=head", "model.head_bias=true", "model.logit_softcap=2.0"),
    ],
}
CHOSEN = ["dp2", "tp2", "tp2 sequence", "pp2", "zero3", "cp2"]
QUICK = [("gemma 2", "tp2"), ("gemma 2", "cp2"), ("phi", "tp2"), ("phi", "pp2")]


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param(family, layout, marks=() if (family, layout) in QUICK else pytest.mark.slow)
        for family in OPTIONS
        for layout in CHOSEN
        if not (family == "olmo 2" and layout.startswith("tp"))
    ],
)
def test_training_is_that_of_one_process(pool, tiny, alone, family, layout):  # noqa: F811
    world, overrides = LAYOUTS[layout]
    ranks = pool.run(train_steps, world, tiny("neox-sequential", "model.rotary_pct=1", *OPTIONS[family], *overrides), 6)
    one = alone("neox-sequential", "model.rotary_pct=1", *OPTIONS[family], steps=6)
    assert len(set(one.losses)) > 1
    assert_equal(ranks, one)


@pytest.mark.parametrize(
    ("family", "layout", "message"),
    [
        (
            "olmo 2",
            ["parallel.tp=2"],
            "model.qk_norm=width is one norm over all heads, which parallel.tp=2 would split",
        ),
        ("gemma 2", ["parallel.cp=2", "parallel.cp_kind=ring"], "model.attention_softcap=1.0 does not; use gather"),
        ("gemma 2", ["parallel.cp=2", "parallel.cp_kind=ulysses"], "model.sliding_window=5 does not; use gather"),
    ],
)
def test_layouts_that_cannot_are_refused_by_name(tiny, family, layout, message):
    with pytest.raises(ConfigError, match=message):
        check_run(tiny("neox-sequential", *OPTIONS[family], *layout), 2)


def test_a_weight_for_each_head_is_refused_in_its_own_words(tiny):
    with pytest.raises(ConfigError, match="model.qk_norm=each_head has a weight for each head"):
        check_run(tiny("neox-sequential", "model.qk_norm=each_head", "parallel.tp=2"), 2)
