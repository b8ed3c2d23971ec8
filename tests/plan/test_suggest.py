"""Layouts: what fits, what is fastest, and the reasons given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from castalia.config.load import load_config
from castalia.config.schema import ModelConfig
from castalia.plan.devices import DEVICES, parse_gpus
from castalia.plan.layout import Layout
from castalia.plan.memory import Compute, Memory
from castalia.plan.step_cost import PlanRequest, evaluate_layout
from castalia.plan.suggest import binding, enough, fitting_layouts, layouts, losers, nearest, suggest, suggestions


def job(preset: str, gpus: str, batch: int = 1024) -> PlanRequest:
    number, device, _ = parse_gpus(gpus)
    config = load_config(preset)
    return PlanRequest(config.model, config.data.seq_length, batch, number, device, Compute())


def test_every_layout_uses_all_devices_and_the_whole_batch() -> None:
    work = job("pythia-1.4b", "16xA100", batch=96)
    found = list(layouts(work))
    assert found
    assert all(layout.gpus == 16 and layout.batch == 96 for layout in found)
    assert len(set(found)) == len(found)


def test_the_20b_needs_more_than_eight_devices_of_40_gb() -> None:
    work = job("gpt-neox-20b", "8x40GB", batch=1536)
    assert not any(verdict.fits for verdict in suggest(work))
    assert enough(work) == 16


@pytest.mark.parametrize(
    ("preset", "gpus", "batch"),
    [
        ("pythia-160m", "4xT4", 32),
        ("gpt-neox-20b", "8x40GB", 64),
        ("gpt-neox-20b", "16x40GB", 64),
        ("neox-175b", "32xH100", 64),
    ],
)
def test_all_that_fit_are_found_without_looking_at_what_cannot(preset: str, gpus: str, batch: int) -> None:
    work = job(preset, gpus, batch)
    assert set(fitting_layouts(work)) == {verdict.layout for verdict in suggest(work) if verdict.fits}


def test_the_best_fits_and_each_reason_is_true() -> None:
    work = job("gpt-neox-20b", "96x40GB", batch=1536)
    ranked = suggest(work)
    best = ranked[0]
    assert best.fits and best.costs.total <= min(v.costs.total for v in ranked if v.fits) + 0.01
    reasons = dict(losers(work, best))
    assert "does not fit" in reasons["zero 0"] and "moments" in reasons["zero 0"]
    assert reasons["recompute full"].endswith("slower: more computing")
    assert all("does not fit" in why or "slower" in why or why == "as fast" for why in reasons.values())


@pytest.mark.parametrize("shape", [
    Layout(tp=2, pp=4, dp=12, zero=1, micro_batch=4, accumulation=32, recompute="full"),
    Layout(tp=2, pp=4, dp=12, zero=1, micro_batch=4, accumulation=32, recompute="full", cp=1, pipeline="interleaved",
           stages_per_rank=11),
    Layout(tp=2, dp=48, zero=3, micro_batch=4, accumulation=8, recompute="selective", sequence_parallel=True),
])  # fmt: skip
def test_no_suggestion_is_slower_than_the_given_layout(shape: Layout) -> None:
    work = job("gpt-neox-20b", "96x40GB", batch=1536)
    found = suggestions(work, shape)
    assert found.given == evaluate_layout(work, shape) and found.given.fits
    assert all(verdict.fits and verdict.costs.total < found.given.costs.total for verdict in found.better)
    assert found.better or "does not fit" in dict(found.losers)["zero 0"]


def test_a_given_layout_that_waits_for_nothing_is_left_alone() -> None:
    work = job("gpt-neox-20b", "96x40GB", batch=1536)
    best = suggestions(work, Layout(tp=8, dp=12, zero=3, micro_batch=1, accumulation=128, recompute="full")).better[0]
    again = suggestions(work, best.layout)
    assert again.better == () and again.losers == tuple(losers(work, best))


def test_the_nearest_that_fit_change_little() -> None:
    work = job("pythia-2.8b", "8xA100-40")
    wanted = Layout(dp=8, micro_batch=16, accumulation=8)
    assert not evaluate_layout(work, wanted).fits
    found = nearest(work, wanted)
    assert len(found) == 3 and all(verdict.fits for verdict in found)
    first = found[0].layout
    changed = [
        name
        for name in ("tp", "pp", "zero", "micro_batch", "recompute")
        if getattr(first, name) != getattr(wanted, name)
    ]
    assert len(changed) <= 2


def test_data_ranks_share_out_experts_where_that_helps() -> None:
    number, device, _ = parse_gpus("8xA100-40")
    experts = {"count": 12, "top_k": 2, "width": 8192}
    model = ModelConfig(num_layers=8, hidden_size=2048, num_heads=16, vocab_size=50_000, experts=experts)
    work = PlanRequest(model, 2048, 64, number, device, Compute())
    tried = list(layouts(work))
    assert {layout.expert for layout in tried} == {1, 2, 4} and len(set(tried)) == len(tried)
    assert all(layout.tp == 1 and layout.dp % layout.expert == 0 for layout in tried if layout.expert > 1)
    whole = Layout(dp=8, micro_batch=1, accumulation=8)
    assert not evaluate_layout(work, whole).fits and evaluate_layout(work, replace(whole, expert=4)).fits
    best = next(verdict for verdict in suggest(work) if verdict.layout.expert > 1)
    assert any(change.startswith("expert ") for change, _ in losers(work, best))


def test_each_cost_grows_with_what_causes_it() -> None:
    work = job("pythia-6.9b", "64xA100")
    base = Layout(dp=64, zero=1, micro_batch=1, accumulation=16)
    tensor = evaluate_layout(work, replace(base, tp=8, dp=8, accumulation=128)).costs
    pipeline = evaluate_layout(work, replace(base, pp=8, dp=8, accumulation=128)).costs
    assert evaluate_layout(work, base).costs.tensor == evaluate_layout(work, base).costs.bubble == 0
    assert tensor.tensor > 0 and pipeline.bubble > 0
    assert pipeline.bubble == pytest.approx((pipeline.compute + pipeline.traffic) * 7 / 128)
    faster = replace(work, device=DEVICES["h100"])
    assert evaluate_layout(faster, base).costs.compute == pytest.approx(
        evaluate_layout(work, base).costs.compute * 312 / 989
    )


def test_the_binding_constraint_is_the_largest_category() -> None:
    assert binding(Memory(1, 2, 3, 4, 9, 5, 6)) == ("activations", 9)
