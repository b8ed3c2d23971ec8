"""`train.recompute=auto` in a run: which blocks of this rank are computed again, decided once.

The plan says before the first step whether memory asks for it at all. If so, the first step computes all blocks again
and measures what that takes for each kind of block; from the second step on only the chosen ones are. What is chosen
changes no bit of an eager run. Compiled blocks may round differently, so that the plan's operations choose there in
place of a clock, before the first step: a resumed run then has the same graphs.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import Any

from castalia.config.attention_kernels import AMPERE
from castalia.config.batch import BatchPlan
from castalia.config.schema import CompleteConfig
from castalia.model.attention import capability
from castalia.parallel.activation_checkpointing import compute_again, recomputations
from castalia.parallel.executor import Executor
from castalia.plan.layout import Layout, blocks_of_rank
from castalia.plan.memory import BlockKind, Rank, block_kinds, compute_of
from castalia.plan.recompute import again_by_kind, again_text, choose_blocks, freed_bytes, ranks_of
from castalia.plan.run_plan import layout_of
from castalia.train.hardware import usable_memory
from castalia.units import memory_size


def layout_in_run(config: CompleteConfig, world: int, plan: BatchPlan) -> Layout:
    """The planner's layout of a run. One process does the work of all ranks, whatever the config's layout."""
    if world > 1:
        return layout_of(config, world)[0]
    recompute = config.train.recompute
    return Layout(micro_batch=plan.micro_batch_size, accumulation=plan.accumulation, recompute=recompute)


def recomputing_of(config: CompleteConfig, executor: Executor, plan: BatchPlan, compiled: bool) -> Recomputing | None:
    """The choice of a run with `train.recompute=auto`, else None. Called on all ranks together."""
    if config.train.recompute != "auto":
        return None
    layout, length, device = layout_in_run(config, executor.world, plan), config.data.seq_length, executor.device
    compute = compute_of(config, config.precision.compute, device.type, capability(device) or AMPERE)
    mine = {number for model in executor.models for number in map(int, model.blocks)}
    stage = next(i for i in range(layout.pp) if mine == set(blocks_of_rank(config.model, layout, length, i)))
    usable = min(executor.gather(usable_memory(device, layout.communicators)))
    return Recomputing(executor, ranks_of(config.model, layout, length, compute)[stage], usable, measures=not compiled)


class Recomputing:
    """Which blocks of this rank are computed again, and why. Its methods are called on all ranks together.

    Ranks that share a block's work repeat its collectives with it, so all that hold the same blocks choose alike: what
    they choose by, memory and seconds, is that of the whole run.
    """

    def __init__(self, executor: Executor, rank: Rank, usable: int, measures: bool) -> None:
        """`usable`: bytes, the same on all ranks. `measures`: whether seconds choose, not the plan's operations."""
        self.executor, self.usable = executor, usable
        self.rank = choose_blocks(rank, usable)
        self.seconds: dict[BlockKind, float] = {}  # that computing a block of a kind again takes
        self.is_open = measures and executor.any(bool(self.rank.again))
        if self.is_open:
            for recomputation in recomputations(executor.models).values():
                recomputation.measure(executor.device)
        else:
            compute_again(executor.models, self.rank.again)

    @property
    def in_force(self) -> Rank:
        """The rank as it computes now."""
        return choose_blocks(self.rank, 0) if self.is_open else self.rank

    def settle(self) -> None:
        """Chooses by what the first step has measured, unless that is done. The device must have computed the step."""
        if not self.is_open:
            return
        self.is_open = False
        kinds = block_kinds(self.rank.model)
        mine: defaultdict[BlockKind, list[float]] = defaultdict(list)
        for number, recomputation in recomputations(self.executor.models).items():
            mine[kinds[number]] += recomputation.seconds
            recomputation.measure(None)
        every = self.executor.gather({kind: median(times) for kind, times in mine.items() if times})
        for kind in dict.fromkeys(kind for found in every for kind in found):
            self.seconds[kind] = max(found[kind] for found in every if kind in found)  # a step waits for its last rank
        self.rank = choose_blocks(self.rank, self.usable, self.seconds)
        compute_again(self.executor.models, self.rank.again)

    def __str__(self) -> str:
        planned, usable = memory_size(self.rank.memory().total), memory_size(self.usable)
        verdict = f"{planned} planned, {usable} usable"
        if self.rank.memory().total > self.usable:
            verdict += ": does not fit"
        text = f"{again_text(again_by_kind(self.rank))} of this rank ({verdict})"
        if self.is_open:
            return f"{text} by the plan; the first step computes all again and measures which"
        times = [
            f"{seconds * 1e3:.3g} ms for {memory_size(freed_bytes(self.rank, kind))} of each {kind} block"
            for kind, seconds in self.seconds.items()
        ]
        return f"{text}, measured: {', '.join(times)}" if times else text

    def facts(self) -> dict[str, Any]:
        """The same for the run's events: numbers of the blocks, seconds and bytes by kind."""
        return {
            "computed_again": sorted(self.rank.again),
            "seconds": {str(kind): round(seconds, 6) for kind, seconds in self.seconds.items()},
            "freed_bytes": {str(kind): freed_bytes(self.rank, kind) for kind in self.seconds},
            "planned_bytes": self.rank.memory().total,
            "usable_bytes": self.usable,
        }
