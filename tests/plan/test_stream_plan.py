"""How a budget is divided: what passes need comes first, then items of a pass, then blocks that stay."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castalia.config.schema import ModelConfig
from castalia.errors import ConfigError
from castalia.plan.stream_plan import (
    PROGRAM_BYTES,
    EvaluationShape,
    StreamedSizes,
    StreamedWork,
    plan_evaluation,
    plan_stream,
    spread,
)

SIZES = StreamedSizes(blocks=(1000,) * 10, head=500, rest=10, cast=300, reading=40)
WORK = StreamedWork(wanted=4, bytes_each=100, working=50, tokens_each=16, flops_per_token=1e6)
LEAST = PROGRAM_BYTES + 10 + 2000 + 300 + 40 + 50 + 100


@given(st.integers(LEAST, LEAST + 20_000))
def test_more_memory_never_reads_more_and_the_budget_is_kept(budget: int) -> None:
    plan, more = plan_stream(SIZES, WORK, budget), plan_stream(SIZES, WORK, budget + 150)
    used = LEAST + 100 * (plan.items - 1) + 1000 * len(plan.resident) + 500 * plan.head_stays
    assert used <= budget
    assert more.passes <= plan.passes
    assert more.passes * more.bytes_per_pass <= plan.passes * plan.bytes_per_pass
    assert plan.bytes_per_pass == 1000 * (10 - len(plan.resident)) + 500 * (not plan.head_stays)


def test_a_budget_that_cannot_work_is_refused_with_the_smallest_that_can() -> None:
    assert plan_stream(SIZES, WORK, LEAST).items == 1
    with pytest.raises(ConfigError, match=r"the least that works here is --memory 0\.31GB"):
        plan_stream(SIZES, WORK, LEAST - 1)


def test_a_head_larger_than_a_block_stays() -> None:
    sizes = StreamedSizes(blocks=(1000,) * 10, head=1500, rest=10, cast=300, reading=40)
    with pytest.raises(ConfigError):
        plan_stream(sizes, WORK, LEAST + 1499)
    assert plan_stream(sizes, WORK, LEAST + 1500).head_stays


@given(st.integers(0, 50), st.integers(1, 50))
def test_residents_are_spread(number: int, blocks: int) -> None:
    chosen = spread(min(number, blocks), blocks)
    assert len(set(chosen)) == min(number, blocks)
    gaps = [b - a for a, b in pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_micro_batches_get_smaller_only_where_they_may() -> None:
    model = ModelConfig(num_layers=4, hidden_size=512, num_heads=8, vocab_size=1000, max_positions=2048)
    shape, budget = EvaluationShape(2048, 8, 100, False), PROGRAM_BYTES + 300_000_000
    plan, found = plan_evaluation(SIZES, model, shape, 4, budget, True)
    assert found.rows < 8 and plan.work.wanted == -(-100 // found.rows)
    with pytest.raises(ConfigError, match="too little"):
        plan_evaluation(SIZES, model, shape, 4, budget, False)
