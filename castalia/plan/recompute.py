"""Which blocks are computed again with `train.recompute=auto`: no more than memory asks for, the cheapest first.

A block is computed again in full or not at all. Blocks of a kind cost alike and free alike, and of these the lowest
come first: the highest one that is computed again needs all its activations while those of every kept block below it
still exist.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from castalia.config.schema import ModelConfig
from castalia.plan.flops import block_flops
from castalia.plan.layout import Layout, rank_parts
from castalia.plan.memory import BlockKind, Compute, Rank, alike, block_kinds


def ranks_of(
    model: ModelConfig, layout: Layout, length: int, compute: Compute, usable: int | None = None
) -> list[Rank]:
    """A rank of each pipeline stage, with the blocks that `usable` bytes make it compute again; None: no block."""
    ranks = [Rank(model, layout, stage, length, compute) for stage in rank_parts(model, layout, length)]
    return ranks if usable is None else [choose_blocks(rank, usable) for rank in ranks]


def choose_blocks(rank: Rank, usable: int, seconds: Mapping[BlockKind, float] | None = None) -> Rank:
    """The rank with the blocks that it computes again so that its peak is at most `usable` bytes: all of them where
    even that is not enough, and with another policy than "auto" the rank as it is.

    `seconds`: what computing a block of each kind again takes; None: its operations decide.
    """
    if rank.layout.recompute != "auto":
        return rank
    kinds, numbers = block_kinds(rank.model), rank.live_blocks
    # A kind that was not measured had no backward pass, as can happen where few tensors train.
    cost = {k: operations(rank, k) if seconds is None else seconds.get(k, 0.0) for k in {kinds[n] for n in numbers}}
    per_byte = {kind: value / max(1, freed_bytes(rank, kind)) for kind, value in cost.items()}
    order = sorted(numbers, key=lambda number: (per_byte[kinds[number]], number))

    def fits(again: list[int]) -> bool:
        return replace(rank, again=frozenset(again)).memory().total <= usable

    counts = range(len(order) + 1)
    again = order[: bisect_left(counts, True, key=lambda count: fits(order[:count]))]
    # The last one may free more than was missing, so that a block of another kind need not be computed again after all.
    for number in sorted(again, key=lambda number: -cost[kinds[number]]):
        if fits(others := [other for other in again if other != number]):
            again = others
    return replace(rank, again=frozenset(again))


def freed_bytes(rank: Rank, kind: BlockKind) -> int:
    """Bytes of a micro-batch that a block of this kind does not keep if it is computed again."""
    return rank.of_kind(kind, False).kept - rank.of_kind(kind, True).kept


def operations(rank: Rank, kind: BlockKind) -> float:
    """Operations of a token in the forward pass of a block of this kind."""
    return block_flops(alike(rank.model, kind), rank.length, kind.layer)


def again_by_kind(rank: Rank) -> dict[str, tuple[int, int]]:
    """How many of the blocks of each kind are computed again, and of how many."""
    kinds = block_kinds(rank.model)
    again, every = Counter(kinds[n] for n in rank.again), Counter(kinds[n] for n in rank.live_blocks)
    return {str(kind): (again[kind], number) for kind, number in every.items()}


def again_text(counts: Mapping[str, tuple[int, int]]) -> str:
    """What `again_by_kind` gives in words: "5 of 12 blocks", or of each kind where there are several."""
    names = [f"{kind} blocks" if len(counts) > 1 else "blocks" for kind in counts]
    return ", ".join(f"{again} of {n} {name}" for (again, n), name in zip(counts.values(), names, strict=True))
