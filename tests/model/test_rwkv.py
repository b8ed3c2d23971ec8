"""RWKV-6: the original's logits, the naive recurrence in value and gradient, texts token by token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from castalia.checkpoint.formats.neox import read as neox_read
from castalia.config import scan_chunks
from castalia.config.schema import ModelConfig, RWKVConfig
from castalia.errors import ConfigError
from castalia.generate.kv_cache import KVCache
from castalia.loading import build_model
from castalia.model.init import initialize, seeded_tensor
from castalia.model.rwkv import MatrixScan, RWKVMixer
from castalia.model.transformer import Transformer
from tests.checkpoint.made import made as random_checkpoint
from tests.model.mixers import require_causal, require_same_token_by_token

SIZES = {"num_layers": 3, "hidden_size": 16, "num_heads": 2, "vocab_size": 64, "vocab_multiple": 1, "max_positions": 64}
PATTERN = ("rwkv", "attention")


def made(**settings):
    """A model all of whose parts have an effect: its low ranks begin with next to none."""
    cfg = ModelConfig(**{**SIZES, "pattern": PATTERN, "init_std": 0.4, **settings})
    model = Transformer(cfg)
    initialize(model, cfg, 1)
    for name, parameter in model.named_parameters():
        if "_down" in name or "_up" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


@pytest.mark.parametrize(("variant", "over"), [("rwkv-fp32", "time"), ("rwkv-fp32-asis", "batch")])
def test_the_originals_logits_come_out(variant, over, fixtures):
    folder = fixtures / "neox-kinds" / variant
    expected = np.load(folder / "expected_logits.npz")
    checkpoint = neox_read.read(folder / "checkpoint" / "global_step5")
    exact = replace(checkpoint, config=checkpoint.config.with_({"neox_exact": over == "batch"}))
    model, tokens = build_model(exact).eval(), torch.from_numpy(expected["input_ids"])
    other = build_model(replace(checkpoint, config=checkpoint.config.with_({"model.rwkv_over": over}))).eval()
    with torch.no_grad():
        assert np.abs(model(tokens).numpy() - expected["logits"]).max() < 1e-5
        assert torch.equal(model(tokens), other(tokens))
        model.blocks["0"].rwkv.time.scan.bonus.zero_()
        assert np.abs(model(tokens).numpy() - expected["logits"]).max() > 0.05


def naive(r, k, v, logs, bonus, state):
    """One token after another."""
    outs = []
    for t in range(r.shape[1]):
        product = k[:, t, :, :, None] * v[:, t, :, None]  # [b, n, m, m]
        outs.append((r[:, t, :, :, None] * (state + bonus[..., None] * product)).sum(-2))
        state = logs[:, t].exp()[..., None] * state + product
    return torch.stack(outs, dim=1), state


@pytest.mark.parametrize("values", [1, 1 << 20], ids=["a group in each chunk", "all in one"])
@pytest.mark.parametrize("length", [1, 16, 41])
@pytest.mark.parametrize("speed", [-3.0, 2.0, 9.0], ids=["slow", "fast", "at once"])
def test_the_scan_is_the_naive_recurrence_in_value_and_gradient(values, length, speed, monkeypatch):
    monkeypatch.setitem(scan_chunks.CHUNK_VALUES, "cpu", values)
    draw = torch.Generator().manual_seed(3)

    def drawn(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    b, n, m = 2, 3, 4
    logs = -(speed + 2 * drawn(b, length, n, m)).exp()
    given = [*(drawn(b, length, n, m) for _ in range(3)), logs, drawn(n, m), drawn(b, n, m, m)]
    weights, seen = drawn(b, length, n, m), []
    for compute in (MatrixScan.apply, naive):
        inputs = [value.clone().requires_grad_(number < 5) for number, value in enumerate(given)]
        out, state = compute(*inputs)
        found = torch.autograd.grad((out * weights).sum(), inputs[:5], materialize_grads=True)
        seen.append([out.detach(), state.detach(), *found])
    for ours, theirs in zip(*seen, strict=True):
        assert (ours - theirs).abs().max() < 1e-10


def test_slow_decays_keep_their_digits_behind_fast_ones():
    """Differences of running sums would lose them in fp32: 22026 has no room for 0.001."""
    draw = torch.Generator().manual_seed(3)
    r, k, v = (torch.randn(1, 16, 1, 4, generator=draw) for _ in range(3))
    logs = torch.full((1, 16, 1, 4), -1e-3)
    logs[:, 2] = -22026.0
    bonus, state = torch.ones(1, 4), torch.zeros(1, 1, 4, 4)
    exact, _ = naive(*(x.double() for x in (r, k, v, logs, bonus, state)))
    assert (MatrixScan.apply(r, k, v, logs, bonus, state)[0] - exact).abs().max() < 1e-5


def test_decays_of_any_strength_have_values_and_gradients():
    mixer = RWKVMixer(ModelConfig(**SIZES), 0)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        mixer.time.scan.decay.copy_(torch.linspace(-200, 200, 16))
    mixer(torch.randn(2, 20, 16)).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in mixer.parameters())


def test_the_scan_keeps_no_states_of_single_tokens(monkeypatch):
    monkeypatch.setitem(scan_chunks.CHUNK_VALUES, "cpu", 16 * 16 * 8)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor.numel()) or tensor, lambda t: t):
        leaves = [torch.randn(1, 64, 2, 4).requires_grad_() for _ in range(3)]
        out, _ = MatrixScan.apply(*leaves, -torch.rand(1, 64, 2, 4), torch.zeros(2, 4), torch.zeros(1, 2, 4, 4))
    # Its inputs, and the states before four chunks; the states of 64 tokens would be 2048.
    assert sum(held) == 4 * 64 * 8 + 8 + 4 * 2 * 4 * 4
    assert not vars(out.grad_fn).keys() - {"size"}  # nothing that activation checkpointing could not drop


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decays_and_bonuses_stay_fp32_in_a_model_that_computes_in_16_bits(dtype):
    checkpoint = random_checkpoint(ModelConfig(**SIZES, pattern=PATTERN), optimizer=False)
    model = build_model(checkpoint, dtype=dtype)
    held = dict(model.named_parameters())
    kept = {name for name, parameter in held.items() if parameter.dtype == torch.float32}
    assert kept == {f"blocks.{i}.rwkv.time.scan.{own}" for i in (0, 2) for own in ("decay", "bonus")}
    assert model(torch.arange(20)[None]).dtype == dtype


def test_a_token_changes_nothing_before_it_and_something_after():
    require_causal(made())


@pytest.mark.parametrize("own_norm", [False, True])
def test_texts_token_by_token_equal_whole_sequences_also_beside_shorter_ones(own_norm):
    cache = require_same_token_by_token(made(embedding_norm=own_norm), [9, 2, 5])
    assert {tuple(part.shape) for part in cache.states[0]} == {(2, 16), (2, 2, 8, 8)}  # however long the text is


@torch.no_grad()
def test_a_state_may_be_cut_anywhere_and_other_sizes_work():
    cfg = ModelConfig(**SIZES, rwkv=RWKVConfig(width=24, mix_rank=3, decay_rank=5))
    mixer = RWKVMixer(cfg, 0)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 40, 16)
    state = mixer.new_state(2, 40, x)
    pieces = [mixer.advance(part, state) for part in x.split([1, 5, 18, 16], dim=1)]
    assert (torch.cat(pieces, dim=1) - mixer(x)).abs().max() < 1e-5


@torch.no_grad()
def test_over_the_batch_a_row_sees_the_rows_before_it_and_no_text_is_continued():
    model = made(pattern=("rwkv",), rwkv_over="batch")
    tokens = torch.randint(64, (3, 10), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[1, 4] += 1
    changed = (model(tokens) - model(other)).abs().amax(dim=-1) > 0
    assert changed.nonzero().tolist() == [[1, 4], [2, 4]]
    with pytest.raises(ConfigError, match="mix the rows of a batch"):
        model.hidden(tokens, cache=KVCache(3, 16, torch.device("cpu")))


def test_initial_values_follow_from_the_depth_and_are_the_same_in_slices():
    cfg = ModelConfig(**SIZES, pattern=("rwkv",))
    decays = [seeded_tensor(cfg, 0, f"blocks.{i}.rwkv.time.scan.decay", (16,)) for i in (0, 2)]
    assert decays[0][[0, -1]].tolist() == decays[1][[0, -1]].tolist() == [-6, -1] and (decays[0] >= decays[1]).all()
    name = "blocks.2.rwkv.time.mix_up"
    up = seeded_tensor(cfg, 0, name, (5, 32, 16))
    assert up.abs().max() <= 1e-4 and up.std() > 4e-5
    assert torch.equal(seeded_tensor(cfg, 0, name, (5, 32, 16), (slice(1, 3), slice(None), slice(None))), up[1:3])
    part = seeded_tensor(cfg, 0, "blocks.1.rwkv.time.mix_g", (16,), (slice(5, 9),))
    assert torch.equal(part, 1 - (torch.arange(16) / 16)[5:9] ** (0.5 * (1 - 1 / 3)))
    one = ModelConfig(**SIZES | {"num_layers": 1}, pattern=("rwkv",))  # where GPT-NeoX divides by zero
    assert seeded_tensor(one, 0, "blocks.0.rwkv.time.scan.bonus", (2, 8)).isfinite().all()
