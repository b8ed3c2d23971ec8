import json
import math
import re
from hashlib import blake2b

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.config.schema import ModelConfig
from castalia.errors import ConfigError
from castalia.model import init
from castalia.model.init import initialize, neox_matrices, seeded_tensor
from castalia.model.transformer import Transformer

TINY = ModelConfig(num_layers=2, hidden_size=48, num_heads=4, vocab_size=100, vocab_multiple=64, max_positions=32)
NEOX = ModelConfig(
    num_layers=2,
    hidden_size=48,
    num_heads=4,
    vocab_size=430,
    vocab_multiple=64,
    max_positions=32,
    rotary_pct=0.5,
    activation="gelu",
    parallel_residual=True,
    init_method="small_init",
    output_init_method="wang_init",
    init="neox",
)


def initialized(cfg: ModelConfig, seed: int = 1) -> Transformer:
    model = Transformer(cfg)
    initialize(model, cfg, seed)
    return model


@pytest.mark.parametrize(("folder", "passes"), [("pp1-mp1-z0-fp32-rotary-par", 1), ("pp0-mp1-z0-fp32-rotary-par", 2)])
def test_the_originals_first_losses(fixtures, folder, passes):
    model = initialized(NEOX.model_copy(update={"init_passes": passes}), seed=1234)
    batch = torch.from_numpy(np.load(fixtures / "neox/data/batches-gbs4.npy")[0].astype(np.int64))
    total, count = model(batch[:, :-1], batch[:, 1:])
    losses = json.loads((fixtures / "neox" / folder / "losses.json").read_text())
    assert (total / count).item() == pytest.approx(losses["straight_step_1_to_10"][0], abs=2e-6)


def test_the_originals_order_of_draws():
    """One stream, but learned positions come from torch's own; matrices are drawn as the original lays them out."""
    update = {"gated_mlp": True, "num_kv_heads": 2, "mlp_size": 64, "position": "learned", "tie_embeddings": True}
    cfg = NEOX.model_copy(update=update)
    matrices = dict(neox_matrices(cfg, seed=7))
    stream = torch.Generator().manual_seed(7 + 2718)
    small, wang = math.sqrt(2 / (5 * 48)), 2 / 2 / math.sqrt(48)
    assert torch.equal(matrices["embed.weight"], torch.empty(448, 48).normal_(0, small, generator=stream))
    default = torch.Generator().manual_seed(7)
    positions = torch.empty(32, 48).normal_(generator=default).normal_(0, small, generator=default)
    assert torch.equal(matrices["positions.weight"], positions)
    qkv = torch.empty(96, 48).normal_(0, small, generator=stream)
    rows = matrices["blocks.0.attn.qkv.weight"].view(2, 4, 12, 48)  # kv heads; two queries, key, value
    assert torch.equal(rows[:, :2].reshape(48, 48), qkv[:48])
    assert torch.equal(rows[:, 2].reshape(24, 48), qkv[48:72])
    assert torch.equal(rows[:, 3].reshape(24, 48), qkv[72:])
    out = torch.empty(48, 48).normal_(0, wang, generator=stream)
    assert torch.equal(matrices["blocks.0.attn.out.weight"], out)
    inner = torch.empty(128, 48).normal_(0, small, generator=stream)
    assert torch.equal(matrices["blocks.0.mlp.up.weight"], inner[:64])
    assert torch.equal(matrices["blocks.0.mlp.gate.weight"], inner[64:])
    assert "head.weight" not in matrices


@settings(max_examples=40)
@given(st.data(), st.sampled_from(["normal", "xavier_uniform", "orthogonal"]))
def test_a_slice_is_a_part_of_the_whole(data, method):
    cfg = TINY.model_copy(update={"init_method": method})
    shape = (data.draw(st.integers(1, 200)), data.draw(st.integers(1, 600)))
    slices = []
    for size in shape:
        start = data.draw(st.integers(0, size))
        slices.append(slice(start, data.draw(st.integers(start, size))))
    name = "blocks.0.mlp.up.weight"
    whole = seeded_tensor(cfg, 5, name, shape)
    assert torch.equal(seeded_tensor(cfg, 5, name, shape, slices), whole[slices[0], slices[1]])


def test_a_tile_comes_from_its_name_and_place():
    drawn = seeded_tensor(TINY, 5, "blocks.1.mlp.up.weight", (130, 520))
    seed = int.from_bytes(blake2b(b"5:blocks.1.mlp.up.weight:1:2").digest()[:8], "little") >> 1
    tile = torch.empty(64, 256, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(seed))
    assert torch.equal(drawn[64:128, 512:], (tile[:, :8] * 0.02).float())


def test_any_number_of_threads_draws_the_same(monkeypatch):
    drawn = []
    for cores in (1, 3, 50):
        monkeypatch.setattr(init, "_cores", lambda cores=cores: cores)
        drawn.append(seeded_tensor(TINY, 5, "blocks.1.mlp.up.weight", (300, 520)))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_several_threads_draw_in_inference_mode_too(monkeypatch):
    monkeypatch.setattr(init, "_cores", lambda: 3)
    with torch.inference_mode():
        assert seeded_tensor(TINY, 1, "blocks.0.mlp.up.weight", (200, 300)).is_inference()


def test_ranks_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(init.os, "sched_getaffinity", lambda process: range(12), raising=False)
    for ranks, cores in (("", 12), ("4", 3), ("24", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert init._cores() == cores


def test_padding_of_the_vocabulary_changes_no_row():
    for method in ("normal", "xavier_normal", "orthogonal"):
        few, many = (
            initialized(TINY.model_copy(update={"init_method": method, "vocab_multiple": multiple}))
            for multiple in (4, 128)
        )
        for name in ("embed.weight", "head.weight"):
            short, long = few.get_parameter(name), many.get_parameter(name)
            assert (len(short), len(long)) == (100, 128)
            assert torch.equal(short, long[:100])


def test_norms_and_biases_are_constant_and_nothing_is_left_unset():
    cfg = TINY.model_copy(update={"qk_norm": True, "position": "learned", "gated_mlp": True})
    model = Transformer(cfg)
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    initialize(model, cfg, seed=3)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert parameter.eq(0).all(), name
        elif "norm" in name:
            assert parameter.eq(1).all(), name
        else:
            assert parameter.isfinite().all() and parameter.std() > 0, name


ZERO_CENTERED = {"norm": "rmsnorm", "zero_centered_norms": True, "embedding_norm": True}


@pytest.mark.parametrize("kind", ["neox", "seeded"])
@pytest.mark.parametrize(
    ("changes", "zeros"),
    [
        (ZERO_CENTERED | {"qk_norm": "each_head"}, "norm1 norm2 norm"),
        (ZERO_CENTERED | {"qk_norm": "head"}, "norm1 norm2 norm attn.q_norm attn.k_norm"),
        (ZERO_CENTERED | {"pattern": ("rwkv", "attention")}, "norm1 norm2 norm"),
        ({"position": "learned", "position_offset": 2}, ""),
    ],
)
def test_only_norms_of_the_models_kind_are_zero_centered(kind, changes, zeros):
    """Others multiply by their weight alone, so that they begin with 1."""
    cfg = TINY.with_(changes | {"init": kind})
    model = Transformer(cfg)
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    initialize(model, cfg, seed=3)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith(".weight"):
            module = re.sub(r"blocks\.\d+\.", "", name.removesuffix(".weight"))
            assert parameter.eq(0 if module in zeros.split() else 1).all(), name


def test_what_the_original_does_not_have_is_refused_and_not_left_unset():
    cfg = TINY.with_({"init": "neox", "experts": {"count": 2, "shared_width": 8}})
    with pytest.raises(ConfigError, match="shared_width=8, which GPT-NeoX does not have"):
        initialize(Transformer(cfg), cfg, seed=3)


def test_seeds_and_names_differ():
    a, b = (seeded_tensor(TINY, 1, f"blocks.{i}.mlp.up.weight", (192, 48)) for i in (0, 1))
    c = seeded_tensor(TINY, 2, "blocks.0.mlp.up.weight", (192, 48))
    assert not torch.equal(a, b) and not torch.equal(a, c)


DEVIATIONS = {
    "normal": 0.02,
    "scaled_normal": 0.02 / math.sqrt(2 * 2),
    "single_residual_scaled_normal": 0.02 / math.sqrt(2),
    "small_init": math.sqrt(2 / (5 * 48)),
    "wang_init": 2 / (2 * math.sqrt(48)),
    "xavier_uniform": math.sqrt(2 / (400 + 300)),
    "xavier_normal": math.sqrt(2 / (400 + 300)),
    "orthogonal": math.sqrt(1 / 400),
    "scaled_orthogonal": math.sqrt(1 / 400) * math.sqrt(2 / 2),
}


@pytest.mark.parametrize("method", DEVIATIONS)
def test_standard_deviations(method):
    for field, name in (("init_method", "mlp.up"), ("output_init_method", "mlp.down")):
        cfg = TINY.model_copy(update={field: method})
        drawn = seeded_tensor(cfg, 1, f"blocks.0.{name}.weight", (400, 300))
        assert drawn.std().item() == pytest.approx(DEVIATIONS[method], rel=0.02)
        assert abs(drawn.mean().item()) < 0.02 * DEVIATIONS[method]


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_orthogonal_rows_or_columns(shape):
    cfg = TINY.model_copy(update={"output_init_method": "scaled_orthogonal", "num_layers": 8})
    drawn = seeded_tensor(cfg, 1, "blocks.0.attn.out.weight", shape)
    square = drawn @ drawn.T if shape[0] < shape[1] else drawn.T @ drawn
    torch.testing.assert_close(square, torch.eye(40) * 2 / 8, atol=1e-6, rtol=0)
