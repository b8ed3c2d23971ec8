"""Mamba: the original's logits, the naive recurrence in value and gradient, texts token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from castalia.checkpoint.formats.neox import read as neox_read
from castalia.config.schema import MambaConfig, ModelConfig
from castalia.loading import build_model
from castalia.model import mamba
from castalia.model.init import initialize, seeded_tensor
from castalia.model.init_kinds import first_steps
from castalia.model.mamba import MambaMixer, Scan
from castalia.model.transformer import Transformer
from tests.checkpoint.made import made as random_checkpoint
from tests.model.mixers import require_causal, require_same_token_by_token

SIZES = {"num_layers": 3, "hidden_size": 16, "num_heads": 2, "vocab_size": 64, "vocab_multiple": 1, "max_positions": 64}
PATTERN = ("mamba", "attention")


def made(**settings):
    cfg = ModelConfig(**{**SIZES, "pattern": PATTERN, "init_std": 0.4, **settings})
    model = Transformer(cfg)
    initialize(model, cfg, 1)
    return model.eval()


@pytest.mark.parametrize(
    ("variant", "near"), [("mamba-pp0-fp32", 1e-5), ("mamba-fp16-dp2-z1", 4e-3), ("hybrid-fp16-dp2-z1", 4e-3)]
)
def test_the_originals_logits_come_out(variant, near, fixtures):
    folder = fixtures / "neox-kinds" / variant
    expected = np.load(folder / "expected_logits.npz")
    model = build_model(neox_read.read(folder / "checkpoint" / "global_step5")).eval()
    tokens = torch.from_numpy(expected["input_ids"])
    with torch.no_grad():
        assert np.abs(model(tokens).float().numpy() - expected["logits"]).max() < near
        model.blocks["0"].mamba.scan.d.zero_()
        assert np.abs(model(tokens).float().numpy() - expected["logits"]).max() > 0.1


def naive(step, x, a, inputs, outputs, state):
    """One token after another."""
    ys = []
    for t in range(x.shape[1]):
        dt = F.softplus(step[:, t])
        entering = (dt * x[:, t])[..., None] * inputs[:, t, None]
        state = torch.exp(dt[..., None] * a) * state + entering
        ys.append((state * outputs[:, t, None]).sum(-1))
    return torch.stack(ys, dim=1), state


@pytest.mark.parametrize("values", [1, 2 * 5 * 3 * 4, 1 << 20])  # one token in a chunk, four, all
@pytest.mark.parametrize("way", ["one by one", "doubled"])
def test_the_scan_is_the_naive_recurrence_in_value_and_gradient(values, way, monkeypatch):
    monkeypatch.setitem(mamba.CHUNK_VALUES, "cpu", values)
    if way == "doubled":  # as on GPUs
        monkeypatch.setattr(mamba, "one_by_one", lambda tensor: False)
    draw = torch.Generator().manual_seed(3)

    def drawn(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    b, t, d, n = 2, 11, 5, 3
    given = [drawn(b, t, d), drawn(b, t, d), -drawn(d, n).exp(), drawn(b, t, n), drawn(b, t, n), drawn(b, d, n)]
    weights, seen = drawn(b, t, d), []
    for compute in (Scan.apply, naive):
        inputs = [value.clone().requires_grad_(number < 5) for number, value in enumerate(given)]
        y, state = compute(*inputs)
        (y * weights).sum().backward()
        seen.append([y.detach(), state.detach(), *(value.grad for value in inputs[:5])])
    for ours, theirs in zip(*seen, strict=True):
        assert (ours - theirs).abs().max() < 1e-10


def test_the_scan_keeps_no_states_of_single_tokens(monkeypatch):
    monkeypatch.setitem(mamba.CHUNK_VALUES, "cpu", 16 * 8 * 4)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor.numel()) or tensor, lambda t: t):
        leaves = [torch.randn(1, 64, 8), torch.randn(1, 64, 8), -torch.rand(8, 4), torch.randn(1, 64, 4)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y, _ = Scan.apply(*leaves, torch.randn(1, 64, 4), torch.zeros(1, 8, 4))
    # Its inputs, and the states before four chunks; the states of 64 tokens would be 2048.
    assert sum(held) == 2 * 64 * 8 + 8 * 4 + 2 * 64 * 4 + 4 * 8 * 4
    assert not vars(y.grad_fn).keys() - {"size"}  # nothing that activation checkpointing could not drop


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decays_steps_and_what_passes_by_stay_fp32_in_a_model_that_computes_in_16_bits(dtype):
    cfg = ModelConfig(**SIZES, pattern=PATTERN)
    checkpoint = random_checkpoint(cfg, optimizer=False)
    held = dict(build_model(checkpoint, dtype=dtype).named_parameters())
    kept = {name for name, parameter in held.items() if parameter.dtype == torch.float32}
    assert kept == {f"blocks.{i}.mamba.scan.{own}" for i in (0, 2) for own in ("a_log", "d", "dt_bias")}
    assert {held[name].dtype for name in held.keys() - kept} == {dtype}
    for name in kept:
        stored = checkpoint.model[name].read()
        assert torch.equal(held[name], stored) and not torch.equal(stored.to(dtype).float(), stored)


def test_a_token_changes_nothing_before_it_and_something_after():
    require_causal(made())


def test_texts_token_by_token_equal_whole_sequences_also_beside_shorter_ones():
    cache = require_same_token_by_token(made(), [9, 2, 5])
    assert {tuple(part.shape) for part in cache.states[0]} == {(2, 3, 32), (2, 32, 16)}  # however long the text is


@torch.no_grad()
def test_a_state_may_be_cut_anywhere_and_other_sizes_work():
    cfg = ModelConfig(**SIZES, mamba=MambaConfig(width=24, states=5, taps=3, rank=2, conv_bias=False, linear_bias=True))
    mixer = MambaMixer(cfg)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 13, 16)
    state = mixer.new_state(2, 13, x)
    pieces = [mixer.advance(part, state) for part in x.split([1, 5, 7], dim=1)]
    assert (torch.cat(pieces, dim=1) - mixer(x)).abs().max() < 1e-5


def test_initial_values_are_mambas_and_the_same_in_slices():
    cfg = ModelConfig(**SIZES, pattern=("mamba",))
    a_log = seeded_tensor(cfg, 0, "blocks.0.mamba.scan.a_log", (32, 16))
    assert torch.allclose(a_log.exp(), torch.arange(1.0, 17).expand(32, 16))
    bias = seeded_tensor(cfg, 0, "blocks.0.mamba.scan.dt_bias", (32,))
    steps = F.softplus(bias)
    assert steps.min() >= 0.001 and steps.max() <= 0.1 and steps.std() > 0.01
    assert torch.equal(seeded_tensor(cfg, 0, "blocks.0.mamba.scan.dt_bias", (32,), (slice(5, 9),)), bias[5:9])
    assert F.softplus(first_steps(torch.tensor([0.0, 1.0]))).tolist() == pytest.approx([0.001, 0.1], rel=1e-4)
