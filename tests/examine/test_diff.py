"""Verdicts on pairs of checkpoints: every relation that is recognised, and what tells it from its neighbours."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from castalia.checkpoint.compare import close, equal, measure, row_orders
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.tensors import Checkpoint, CheckpointFacts, Progress
from castalia.config.schema import ModelConfig, OptimizerConfig, RunConfig
from castalia.examine.diff import diff, model_settings
from castalia.examine.verify import verify
from castalia.model.init import initialize
from castalia.model.transformer import Transformer
from castalia.storage.lazy import InMemory
from tests.checkpoint.made import FAMILIES, SIZES, made, written

NEOX = FAMILIES["gpt_neox"]


def mapped(checkpoint: Checkpoint, change: Callable[[str, Tensor], Tensor]) -> Checkpoint:
    """With every weight replaced by `change(name, weight)`."""
    model = {name: InMemory(change(name, ref.read()).contiguous()) for name, ref in checkpoint.model.items()}
    return replace(checkpoint, model=model)


def only(ending: str, change: Callable[[Tensor], Tensor]) -> Callable[[str, Tensor], Tensor]:
    return lambda name, weight: change(weight) if name.endswith(ending) else weight


def at_step_0(cfg: ModelConfig, seed: int) -> Checkpoint:
    model = Transformer(cfg)
    initialize(model, cfg, seed)
    weights = {name: InMemory(parameter.detach()) for name, parameter in model.named_parameters()}
    return Checkpoint("memory", "native", weights, None, Progress(), RunConfig(model=cfg))


def test_a_checkpoint_is_identical_to_itself_in_another_format(tmp_path: Path) -> None:
    source = made(NEOX)
    found = diff(source, written(source, tmp_path / "hf", "hf"))
    assert found.verdict == "identical"
    assert found.words == "identical: all 28 tensors, bit for bit"
    assert found.counts == {"identical": 28}
    assert found.structure == ()
    assert found.optimizer == "optimizer state: 28 of 28 parameters equal (masters, moments, step)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_weights_in_another_dtype(dtype: torch.dtype) -> None:
    found = diff(made(NEOX), made(NEOX, dtype=dtype))
    assert found.verdict == "dtype"
    assert "28 equal after rounding (float32 here" in found.words
    assert diff(made(NEOX, dtype=torch.bfloat16), made(NEOX, dtype=torch.float16)).verdict == "dtype"


def test_more_padding_and_other_padding() -> None:
    source = made(NEOX)
    longer = mapped(source, lambda name, w: torch.cat([w, w[:32]]) if name in ("embed.weight", "head.weight") else w)
    found = diff(source, longer)
    assert found.verdict == "padding"
    assert "96 rows here, 128 there" in found.words
    noise = mapped(source, only("embed.weight", lambda w: torch.cat([w[:90], torch.randn(6, 32)])))
    found = diff(source, noise)
    assert found.verdict == "padding"
    assert "rows 90 to 95, which belong to no token" in found.words
    token = mapped(source, only("embed.weight", lambda w: torch.cat([w[:89], torch.randn(7, 32)])))
    assert diff(source, token).verdict != "padding"


@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "mistral"])
@pytest.mark.parametrize("undone", [False, True])
def test_every_other_order_of_rows_is_named(kind: str, undone: bool) -> None:
    model = FAMILIES[kind]
    source = made(model)
    for detail, order in row_orders(model):
        rows = order.argsort() if undone else order
        found = diff(source, mapped(source, only("attn.qkv.weight", lambda w, rows=rows: w[rows])))
        if torch.equal(rows, torch.arange(len(rows))):
            assert found.verdict == "identical"
        else:
            assert found.verdict == "layout"
            known = [text for text, other in row_orders(model) if torch.equal(other, order)]
            assert any(text in found.words for text in [*known, "undone"]), (detail, found.words)


def test_rotary_pairs_are_recognised_by_their_definition() -> None:
    """Raw Llama weights turn dimensions 2 i and 2 i + 1 together, ours i and i + half."""
    model = FAMILIES["llama"]
    source = made(model)
    half = model.head_size // 2

    def paired(weight: Tensor) -> Tensor:
        heads = weight.view(model.kv_heads, -1, model.head_size, weight.shape[1]).clone()
        turning = heads[:, :-1].clone()
        for i in range(half):
            heads[:, :-1, 2 * i], heads[:, :-1, 2 * i + 1] = turning[:, :, i], turning[:, :, half + i]
        return heads.view_as(weight)

    found = diff(source, mapped(source, only("attn.qkv.weight", paired)))
    assert found.verdict == "layout"
    assert "rotary dimensions are interleaved pairs" in found.words


@pytest.mark.parametrize(("factor", "detail"), [(2.0, "1/2 of what"), (0.5, "2 times as large"), (8.0, "1/8 of what")])
def test_a_bias_summed_over_tensor_ranks(factor: float, detail: str) -> None:
    source = made(NEOX)

    def summed(name: str, weight: Tensor) -> Tensor:
        return weight / factor if name.endswith(("attn.out.bias", "mlp.down.bias")) else weight

    found = diff(source, mapped(source, summed))
    assert found.verdict == "bias_summed"
    assert detail in found.words
    assert found.counts == {"identical": 24, "bias_summed": 4}


def test_a_transposed_matrix() -> None:
    source = made(NEOX)
    found = diff(source, mapped(source, only("attn.out.weight", torch.t)))  # square: the shapes tell nothing
    assert found.verdict == "transposed"
    found = diff(source, mapped(source, only("mlp.up.weight", torch.t)))
    assert found.verdict == "transposed"
    assert found.counts["transposed"] == 2


def test_swapped_halves_of_a_gated_mlp() -> None:
    source = made(FAMILIES["llama"])
    twins = {"up": "gate", "gate": "up"}

    def swap(name: str, weight: Tensor) -> Tensor:
        for half, other in twins.items():
            if f".mlp.{half}." in name:
                return source.model[name.replace(f".{half}.", f".{other}.")].read()
        return weight

    assert diff(source, mapped(source, swap)).verdict == "halves_swapped"


def test_tied_against_untied() -> None:
    source = made(NEOX)
    tied = {name: ref for name, ref in source.model.items() if name != "head.weight"}
    found = diff(source, replace(source, model=tied))
    assert found.verdict == "tied"
    assert "only A has a head, which is not its embedding" in found.words
    copy = mapped(source, only("head.weight", lambda _: source.model["embed.weight"].read()))
    assert "both compute the same" in diff(replace(source, model=tied), copy).words


def test_a_fine_tune_has_its_change_layer_by_layer() -> None:
    source = made(NEOX)
    torch.manual_seed(1)

    def tuned(name: str, weight: Tensor) -> Tensor:
        size = 0.2 if name.startswith("blocks.1") else 0.05
        return weight + size * weight.square().mean().sqrt() * torch.randn_like(weight)

    found = diff(source, mapped(source, tuned))
    assert found.verdict == "fine_tune"
    assert list(found.updates) == ["embed", "blocks.0", "blocks.1", "norm", "head"]
    assert found.updates["blocks.0"] == pytest.approx(0.05, rel=0.05)
    assert found.updates["blocks.1"] == pytest.approx(0.2, rel=0.05)


def trained(source: Checkpoint, step: int, lr: float, size: float, seed: int = 1) -> Checkpoint:
    """A step of a run of ours that took the source's weights so far that some have little in common with them."""
    torch.manual_seed(step)
    assert source.config
    config = source.config.model_copy(update={"seed": seed, "optimizer": OptimizerConfig(lr=lr)})
    far = {"embed.weight": 3.0}
    moved = mapped(source, lambda name, w: w + far.get(name, size) * w.square().mean().sqrt() * torch.randn_like(w))
    progress, facts = Progress(step=step), CheckpointFacts(data_fingerprint="words")
    return replace(moved, format="native", config=config, progress=progress, facts=facts)


def test_runs_of_one_seed_are_no_later_steps_of_each_other() -> None:
    source = made(NEOX)
    run = trained(source, 10, 0.1, 0.1)
    found = diff(run, trained(source, 12, 0.2, 0.1))
    assert found.verdict == "siblings"
    assert found.words.startswith("two runs from the same initial weights (seed 1), after 10 and 12 steps: 0 of 28")
    assert "1 are new, or changed beyond recognition: embed.weight" in found.words
    assert diff(run, trained(source, 10, 0.1, 0.2)).verdict == "siblings"  # the same step, but other values
    assert source.config and source.config.model
    model = source.config.model.model_copy(update={"max_positions": 96})
    longer = replace(source, config=source.config.model_copy(update={"model": model}))
    assert diff(run, trained(longer, 12, 0.1, 0.1)).verdict == "siblings"  # which draw the same weights
    later = diff(run, trained(source, 12, 0.1, 0.1))
    assert later.verdict == "fine_tune"
    assert later.words.startswith("B is a later step of A's run, or of the same run once more: ")
    unknown = diff(run, trained(source, 12, 0.1, 0.1, seed=2))
    assert unknown.words.startswith("they come from the same weights: one is a fine-tune or a later step of the other,")


def test_equal_init_methods_with_different_draws() -> None:
    cfg = ModelConfig(num_layers=6, hidden_size=48, num_heads=4, vocab_size=448, vocab_multiple=64, rotary_pct=0.25)
    found = diff(at_step_0(cfg, 1), at_step_0(cfg, 2))
    assert found.verdict == "same_init"
    assert found.words.startswith(
        "50 of 76 tensors bit-identical: all norms and biases; the 26 that differ are exactly the random matrices"
    )
    assert "same init method, different random draw" in found.words
    parts = [part.part for part in found.parts]
    assert parts == ["embedding", "head", "attention qkv", "attention out", "mlp up", "mlp down"]
    assert all(part.ratio == pytest.approx(1, abs=0.03) for part in found.parts)
    wider = diff(at_step_0(cfg, 1), at_step_0(cfg.model_copy(update={"vocab_multiple": 512}), 2))
    assert wider.verdict == "same_init"
    scaled = diff(at_step_0(cfg, 1), at_step_0(cfg.model_copy(update={"output_init_method": "normal"}), 2))
    assert scaled.verdict == "unrelated"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_said_and_the_others_judged(value: float) -> None:
    broken = mapped(made(NEOX), only("0.mlp.down.weight", lambda weight: weight.clone().fill_(value)))
    found = diff(made(NEOX), broken)
    assert found.verdict == "not_finite"
    assert found.words.startswith("1 tensors hold NaN or infinite values, blocks.0.mlp.down.weight first; the others: ")
    assert diff(broken, broken).verdict == "identical" and verify(broken, broken).holds
    assert not verify(made(NEOX), broken).holds and not verify(broken, made(NEOX)).holds


def test_unrelated_weights_and_other_architectures() -> None:
    assert diff(made(NEOX, 1), made(NEOX, 2)).verdict == "unrelated"
    found = diff(made(NEOX), made(ModelConfig(**SIZES | {"num_layers": 3}, rotary_pct=0.5, parallel_residual=True)))
    assert found.verdict == "other_architecture"
    assert "model.num_layers: 2 | 3" in found.structure
    assert diff(made(NEOX), made(ModelConfig(**SIZES | {"hidden_size": 64}))).verdict == "other_architecture"
    assert diff(made(NEOX), made(FAMILIES["llama"])).verdict == "other_architecture"


def test_what_rwkv_blocks_mix_without_a_word_is_time() -> None:
    """As a checkpoint of GPT-NeoX leaves it, from which a run may go on that says so."""
    silent, said = (ModelConfig(**SIZES, pattern=("rwkv",), rwkv_over=over) for over in (None, "time"))
    assert model_settings(silent) == model_settings(said)
    assert model_settings(silent) != model_settings(silent.with_({"rwkv_over": "batch"}))


def test_genuine_checkpoints(fixtures: Path) -> None:
    """Their upstream conversions are the same weights, in fp32; a run without weight decay is a near relative."""
    folder = fixtures / "neox"
    sixteen = folder / "pp1-mp1-dp3-z1-bf16-rotary-par"
    found = diff(open_checkpoint(sixteen / "checkpoint"), open_checkpoint(sixteen / "hf"))
    assert found.verdict in ("dtype", "identical")
    ours = open_checkpoint(folder / "pp1-mp1-z0-fp32-rotary-par" / "checkpoint")
    related = diff(ours, open_checkpoint(folder / "pp1-mp1-dp2-z1-fp32-rotary-par-nowd" / "checkpoint"))
    assert related.verdict == "fine_tune"
    other = diff(ours, open_checkpoint(folder / "pp1-mp2-z0-fp32-rotary-par" / "checkpoint"))
    assert other.verdict == "unrelated"
    assert other.relations["embed.weight"].detail == "448 rows here, 512 there"


def test_figures_are_those_of_their_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("castalia.checkpoint.compare.PAIR_BYTES", 100)  # several pieces
    torch.manual_seed(0)
    a, b = torch.randn(13, 7), torch.randn(13, 7)
    found = measure(InMemory(a), InMemory(b))
    assert found.count == 91
    assert found.max_diff == pytest.approx(float((a - b).abs().max()))
    assert found.relative == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-6)
    assert found.std_a == pytest.approx(float(a.std(correction=0)), rel=1e-6)
    assert found.correlation == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), rel=1e-6)


def test_equality_sees_one_changed_row_and_the_sign_of_zero() -> None:
    a = torch.zeros(200, 3)
    assert equal(InMemory(a), InMemory(a.clone()))
    for value in (1.0, -0.0):
        b = a.clone()
        b[101, 1] = value
        assert not equal(InMemory(a), InMemory(b))
    assert not close(InMemory(a), InMemory(a))


def test_the_command_prints_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from castalia.cli.diff import command

    cfg = ModelConfig(**SIZES | {"vocab_size": 96})
    for seed in (1, 2):
        written(at_step_0(cfg, seed), tmp_path / str(seed), "native")
    command(str(tmp_path / "1"), str(tmp_path / "2"), plot=tmp_path / "out" / "ratios.png")
    shown = capsys.readouterr().out
    assert "verdict: 18 of 28 tensors bit-identical" in shown
    assert "pipe_parallel_size 0 instead of 1" in shown
    assert "attention out" in shown
    assert (tmp_path / "out" / "ratios.png").stat().st_size > 1000
    command(str(tmp_path / "1"), str(tmp_path / "2"), as_json=True)
    record = json.loads(capsys.readouterr().out)
    assert record["verdict"] == "same_init"
    assert record["counts"] == {"identical": 18, "unrelated": 10}
    assert record["tensors"]["embed.weight"]["relation"] == "unrelated"
    assert len(record["causes"]) == 5
