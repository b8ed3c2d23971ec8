"""With recompute=auto a plan computes as few blocks again as memory asks for, and the cheapest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from castalia.config.schema import FinetuneConfig, ModelConfig
from castalia.plan.devices import find_device
from castalia.plan.flops import executed_flops
from castalia.plan.layout import Layout, blocks_of_rank, rank_parts
from castalia.plan.memory import BlockKind, Compute, Rank, activations, block_activations, block_kinds
from castalia.plan.recompute import again_by_kind, again_text, choose_blocks, freed_bytes, ranks_of
from castalia.plan.step_cost import PlanRequest, evaluate_layout
from castalia.units import GiB

LENGTH = 1024
BASE = {"num_layers": 12, "hidden_size": 512, "num_heads": 8, "vocab_size": 4096, "max_positions": LENGTH}
ONE_KIND, MIXED = ModelConfig(**BASE), ModelConfig(**BASE, pattern=("mamba", "attention"))
WINDOWS = ModelConfig(**BASE, sliding_window=64, window_pattern=(True, True, False))
LAYOUT = Layout(micro_batch=8, recompute="auto")
MAMBA, DENSE = BlockKind("mamba"), BlockKind("dense")


def rank_of(model: ModelConfig, layout: Layout = LAYOUT, compute: Compute | None = None) -> Rank:
    return ranks_of(model, layout, LENGTH, compute or Compute())[0]


def total(rank: Rank, *again: int) -> int:
    return replace(rank, again=frozenset(again)).memory().total


@pytest.mark.parametrize("model", [ONE_KIND, MIXED, WINDOWS], ids=["one kind", "mamba", "windows"])
def test_between_the_ends_memory_is_that_of_none_and_of_full(model) -> None:
    rank = rank_of(model)
    for policy, again in (("none", ()), ("full", range(12))):
        fixed = rank_of(model, replace(LAYOUT, recompute=policy))
        assert total(rank, *again) == fixed.memory().total
    sizes = [total(rank, *range(number)) for number in range(13)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_one_block_less_would_not_fit(part) -> None:
    rank = rank_of(ONE_KIND)
    usable = int(total(rank, *range(12)) * part + total(rank) * (1 - part))
    again = choose_blocks(rank, usable).again
    assert 0 < len(again) < 12
    assert total(rank, *again) <= usable
    assert all(total(rank, *(again - {number})) > usable for number in again)
    assert again == set(range(len(again)))


def test_the_lowest_of_equal_blocks_are_computed_again() -> None:
    rank = rank_of(ONE_KIND.with_({"vocab_size": 256}))  # so that the loss needs less than a block
    lowest, highest = total(rank, *range(6)), total(rank, *range(6, 12))
    # Above all that is kept the highest needs its own activations at once.
    assert highest - lowest == pytest.approx(freed_bytes(rank, DENSE), rel=0.1)


def test_the_ends_are_none_and_all() -> None:
    rank = rank_of(ONE_KIND)
    assert choose_blocks(rank, total(rank)).again == frozenset()
    assert choose_blocks(rank, total(rank, *range(12)) - 1).again == set(range(12))
    fixed = rank_of(ONE_KIND, replace(LAYOUT, recompute="full"))
    assert choose_blocks(fixed, 10**15) is fixed


def test_the_kind_that_costs_least_for_its_bytes_is_computed_again() -> None:
    rank, kinds = rank_of(MIXED), block_kinds(MIXED)
    usable = total(rank, 0, 1)
    for cheap, dear in ((MAMBA, DENSE), (DENSE, MAMBA)):
        again = choose_blocks(rank, usable, {cheap: 1e-3, dear: 1.0}).again
        assert {kinds[number] for number in again} == {cheap}
        assert total(rank, *again) <= usable
    # Not the kind that takes the shorter time, but that which takes it for the fewer bytes.
    more, less = sorted((MAMBA, DENSE), key=lambda kind: -freed_bytes(rank, kind))
    slow = 0.9 * freed_bytes(rank, more) / freed_bytes(rank, less)
    assert slow > 1
    again = choose_blocks(rank, usable, {more: slow, less: 1.0}).again
    assert {kinds[number] for number in again} == {more}


def test_what_the_last_block_frees_too_much_is_kept_elsewhere() -> None:
    rank, kinds = rank_of(MIXED), block_kinds(MIXED)
    more, less = sorted((MAMBA, DENSE), key=lambda kind: -freed_bytes(rank, kind))
    small, large = ([n for n in range(12) if kinds[n] == kind] for kind in (less, more))
    usable = total(rank, *small, large[0])
    # All of the small ones first, then a large one, which alone would do for at least one of them.
    costs = {less: 1.0, more: 1.1 * freed_bytes(rank, more) / freed_bytes(rank, less)}
    again = choose_blocks(rank, usable + freed_bytes(rank, less), costs).again
    assert total(rank, *again) <= usable + freed_bytes(rank, less)
    assert len(again) == len(small)
    assert all(total(rank, *(again - {number})) > usable + freed_bytes(rank, less) for number in again)


def test_a_stage_that_holds_more_micro_batches_computes_more_again() -> None:
    layout = replace(LAYOUT, pp=4, accumulation=8)
    ranks = ranks_of(ONE_KIND, layout, LENGTH, Compute())
    usable = int(0.6 * ranks[0].memory().total)
    numbers = [len(rank.again) for rank in ranks_of(ONE_KIND, layout, LENGTH, Compute(), usable)]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] > numbers[-1]


@pytest.mark.parametrize(("pipeline", "per_rank"), [("1f1b", 1), ("interleaved", 2), ("zero-bubble", 2)])
def test_ranks_hold_every_block_once(pipeline, per_rank) -> None:
    layout = Layout(pp=3, pipeline=pipeline, stages_per_rank=per_rank)
    held = [blocks_of_rank(ONE_KIND, layout, LENGTH, rank) for rank in range(3)]
    assert sorted(number for numbers in held for number in numbers) == list(range(12))
    assert [len(numbers) for numbers in held] == [part.layers for part in rank_parts(ONE_KIND, layout, LENGTH)]


def test_blocks_below_all_that_trains_are_left_alone() -> None:
    compute = Compute(finetune=FinetuneConfig(train=(r"^blocks\.1[01]\.",)))
    rank = choose_blocks(rank_of(ONE_KIND, compute=compute), 0)
    assert rank.again == {10, 11}


def test_kinds_keep_what_blocks_keep_on_average() -> None:
    experts = ModelConfig(**BASE, experts={"count": 4, "top_k": 2, "every": 3})
    for model in (MIXED, WINDOWS, experts):
        for policy in ("none", "selective", "full"):
            layout, kinds = replace(LAYOUT, recompute=policy), block_kinds(model)
            parts = [block_activations(model, kind, layout, 8 * LENGTH, LENGTH, Compute()).whole for kind in kinds]
            assert len(set(kinds)) == 2 and len(set(parts)) == (1 if model is WINDOWS else 2)
            assert activations(model, layout, 8 * LENGTH, LENGTH, Compute()).whole == sum(parts) // 12
    assert [str(kind) for kind in block_kinds(WINDOWS)[:3]] == ["dense windowed", "dense windowed", "dense"]


def test_time_and_operations_lie_between_none_and_full() -> None:
    device = replace(find_device("H100"), memory_gib=1000.0)  # type: ignore[type-var]
    job = PlanRequest(ONE_KIND, LENGTH, 8, 1, device, Compute())
    none, full = (evaluate_layout(job, replace(LAYOUT, recompute=policy)) for policy in ("none", "full"))
    assert evaluate_layout(job, LAYOUT).costs == none.costs
    needed = (none.memory.total + full.memory.total) / 2 / GiB
    tight = replace(job, device=replace(device, memory_gib=needed / 0.92 + 1))
    found = evaluate_layout(tight, LAYOUT)
    assert found.fits and not evaluate_layout(tight, replace(LAYOUT, recompute="none")).fits
    assert none.costs.total < found.costs.total < full.costs.total
    executed = [executed_flops(ONE_KIND, LENGTH, "auto", range(number)) for number in range(13)]
    assert executed == sorted(executed)
    assert executed[0] == executed_flops(ONE_KIND, LENGTH, "none")
    assert executed[12] == pytest.approx(executed_flops(ONE_KIND, LENGTH, "full"))


def test_words() -> None:
    rank = replace(rank_of(MIXED), again=frozenset({0, 2, 3}))
    assert again_by_kind(rank) == {"mamba": (2, 6), "dense": (1, 6)}
    assert again_text(again_by_kind(rank)) == "2 of 6 mamba blocks, 1 of 6 dense blocks"
    assert again_text({"dense": (5, 12)}) == "5 of 12 blocks"
