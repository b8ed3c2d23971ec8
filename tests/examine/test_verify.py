"""The proof after a conversion: equal models pass, and what is wrong with others is named."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from castalia.checkpoint.opener import open_checkpoint
from castalia.config.schema import ExpertsConfig, ModelConfig
from castalia.errors import CheckpointError, ConfigError
from castalia.examine.verify import logits, probe_tokens, verify
from castalia.loading import build_model
from tests.checkpoint.made import FAMILIES, SIZES, changed, made, written

OTHERS = {
    "alibi": ModelConfig(**SIZES, position="alibi"),
    "sinusoidal": ModelConfig(**SIZES, position="sinusoidal", norm="scalenorm"),
    "shared norm": ModelConfig(**SIZES, parallel_residual=True, shared_norm=True, norm="layernorm_no_params"),
}


@pytest.mark.parametrize("kind", [*FAMILIES, *OTHERS])
def test_block_by_block_gives_the_logits_of_the_whole_model(kind: str) -> None:
    checkpoint = made({**FAMILIES, **OTHERS}[kind])
    tokens = probe_tokens(90, 20)
    with torch.no_grad():
        expected = build_model(checkpoint)(tokens)
    assert torch.allclose(logits(checkpoint, tokens, 90), expected[..., :90], atol=1e-5)


def test_genuine_logits_come_out(fixtures: Path) -> None:
    folder = fixtures / "neox" / "pp1-mp2-z0-fp32-rotary-par"
    known = np.load(folder / "expected_logits.npz")
    expected = torch.from_numpy(known["logits"])
    found = logits(open_checkpoint(folder / "checkpoint"), torch.from_numpy(known["input_ids"]), expected.shape[-1])
    assert torch.allclose(found, expected, atol=3e-6)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_conversion_holds(kind: str, tmp_path: Path) -> None:
    source = made(FAMILIES[kind])
    proof = verify(source, written(source, tmp_path / "out", "hf"))
    assert proof.holds
    assert proof.max_diff == 0
    assert proof.agreement == 1
    assert proof.equal_tensors == proof.num_tensors == len(source.model)
    assert proof.equal_state == proof.num_state == 3 * len(source.model)
    assert "84 of 84 tensors bit-equal" in str(proof) or len(source.model) != 28


def test_rounded_weights_hold_within_their_dtype() -> None:
    source = made(FAMILIES["gpt_neox"])
    rounded = replace(made(FAMILIES["gpt_neox"], dtype=torch.bfloat16), optimizer=None)
    proof = verify(source, rounded)
    assert proof.holds
    assert 0 < proof.max_diff < 0.1 * proof.scale
    assert proof.equal_state is None


def test_a_token_whose_experts_rounding_changes_is_no_other_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token of each row has logits far away, as with another expert."""
    cfg = ModelConfig(**SIZES, experts=ExpertsConfig(count=4, width=16))
    sides = made(cfg), made(cfg, dtype=torch.bfloat16)
    switched = torch.zeros(2, 10, 1)
    answers = iter([switched, switched.index_fill(1, torch.tensor([3]), 5.0)] * 2)
    monkeypatch.setattr("castalia.examine.verify.logits", lambda *_: next(answers))
    proof = verify(*sides)
    assert proof.holds and proof.max_diff == 5 and "judged by the middle one, 0" in str(proof)
    assert not verify(sides[0], sides[0]).holds  # nothing was rounded


def test_what_differs_is_named_first_in_the_order_of_the_model() -> None:
    source = made(FAMILIES["gpt_neox"])
    qkv = source.model["blocks.0.attn.qkv.weight"].read()
    wrong = changed(
        source,
        blocks__1__mlp__down__bias=2 * source.model["blocks.1.mlp.down.bias"].read(),
        blocks__0__attn__qkv__weight=qkv.view(4, 3, 8, 32).transpose(0, 1).reshape(96, 32),
    )
    proof = verify(source, wrong)
    assert not proof.holds
    assert proof.difference.startswith("blocks.0.attn.qkv.weight: its rows are permuted: rows are all queries")
    assert proof.equal_tensors == proof.num_tensors - 2


@pytest.mark.parametrize(
    ("family", "name", "change", "message"),
    [
        ("gpt_neox", "blocks.1.attn.out.weight", torch.t, "looks transposed"),
        ("gpt_neox", "blocks.1.attn.out.bias", lambda x: 4 * x, "summed over tensor ranks.*4|1/4"),
        ("llama", "blocks.0.mlp.up.weight", lambda x: x + 0.01, "near, but not the same"),
        ("llama", "embed.weight", torch.randn_like, "nothing to do with each other"),
    ],
)
def test_what_a_difference_looks_like(family: str, name: str, change: object, message: str) -> None:
    source = made(FAMILIES[family])
    torch.manual_seed(99)
    proof = verify(source, changed(source, **{name: change(source.model[name].read()).contiguous()}))
    assert not proof.holds

    assert re.search(f"^{re.escape(name)}: .*({message})", proof.difference), proof.difference


def test_swapped_halves_are_named() -> None:
    source = made(FAMILIES["llama"])
    up, gate = (source.model[f"blocks.0.mlp.{half}.weight"].read() for half in ("up", "gate"))
    proof = verify(source, changed(source, **{"blocks.0.mlp.up.weight": gate, "blocks.0.mlp.gate.weight": up}))
    assert proof.difference.startswith("blocks.0.mlp.gate.weight: the halves of the gated MLP are swapped")


def test_lost_optimizer_tensors_are_noticed() -> None:
    source = made(FAMILIES["gpt2"])
    state = dict(source.optimizer)
    state["norm.bias"] = {**state["norm.bias"], "exp_avg": state["norm.bias"]["exp_avg_sq"]}
    proof = verify(source, replace(source, optimizer=state))
    assert not proof.holds
    assert proof.equal_state == proof.num_state - 1


def test_the_command_fails_where_the_proof_does(tmp_path: Path) -> None:
    from castalia.cli import convert

    written(made(FAMILIES["gpt2"]), tmp_path / "a", "native")
    written(made(FAMILIES["gpt2"], 1), tmp_path / "b", "hf")
    with pytest.raises(CheckpointError, match="not the same model: embed.weight: the values have nothing"):
        convert._verify(open_checkpoint(tmp_path / "a"), tmp_path / "b", None, None)


def test_only_what_ranks_round_is_forgiven() -> None:
    """A bias that is off by more than that is named, and so is the same change of another tensor."""
    source = replace(made(FAMILIES["gpt_neox"], dtype=torch.float16, optimizer=False), summed_bias_ranks=4)
    bias, norm = (source.model[f"blocks.0.{name}"].read() for name in ("mlp.down.bias", "norm1.bias"))
    step = 2.0**-24
    assert verify(source, changed(source, blocks__0__mlp__down__bias=bias + 2 * step)).holds
    for name, value in (("mlp__down__bias", bias * 1.01), ("norm1__bias", norm * 1.001)):
        proof = verify(source, changed(source, **{f"blocks__0__{name}": value}))
        assert not proof.holds and name.replace("__", ".") in proof.difference


def test_a_budget_of_memory_changes_no_verdict(tmp_path: Path) -> None:
    source = made(FAMILIES["llama"])
    result = written(source, tmp_path / "out", "hf")
    assert str(verify(source, result, memory=10**9)) == str(verify(source, result))
    with pytest.raises(ConfigError, match="the least that works here"):
        verify(source, result, memory=10**8)
