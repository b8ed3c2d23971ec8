"""How a step's batch is made up: sequences of the step = micro-batch * accumulation * data-parallel ranks.

Sizes that rise over the first steps are functions of the step alone, as everything else of a batch is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

from castalia.config.objective import PAIRED
from castalia.config.schema import EarlierBatch, RunConfig, Warmup
from castalia.errors import ConfigError

_WARMUP = "train.batch_size_warmup"
_PATHS = ("train.batch_size", "train.micro_batch_size", "train.accumulation")


class BatchPlan(NamedTuple):
    batch_size: int  # sequences of a step over all ranks
    micro_batch_size: int  # sequences of one forward pass on one rank
    accumulation: int  # forward passes of a step

    def at(self, step: int, warmup: Warmup | None) -> BatchPlan:
        """The same forward passes, but as many as a step (from 0) takes while the batch is rising."""
        size = size_at(warmup, step, self.batch_size)
        return self._replace(batch_size=size, accumulation=self.accumulation * size // self.batch_size)

    def rows_of(self, data_rank: int) -> list[int]:
        """The rows of the step's batch that one data rank takes, micro-batch by micro-batch."""
        micro, ranks = self.micro_batch_size, self.batch_size // self.micro_batch_size // self.accumulation
        firsts = [(number * ranks + data_rank) * micro for number in range(self.accumulation)]
        return [row for first in firsts for row in range(first, first + micro)]


def size_at(warmup: Warmup | None, step: int, whole: int) -> int:
    """A size in a step, from 0, that may be rising still."""
    return warmup.at(step, whole) if warmup else whole


@lru_cache
def _rising(warmup: Warmup, whole: int) -> tuple[int, ...]:
    """The sums of the sizes before each step, up to the first step of the whole size."""
    sums = [0]
    while (size := warmup.at(len(sums) - 1, whole)) < whole:
        sums.append(sums[-1] + size)
    return tuple(sums)


def spans(earlier: Sequence[EarlierBatch], steps: int, whole: int) -> Iterator[tuple[int, int, int]]:
    """First step (from 0), end and whole size of each stretch of the first so many steps that has a size of its own."""
    begin = 0
    for until, size in (*((span.until, span.batch_size) for span in earlier), (steps, whole)):
        yield begin, max(begin, min(until, steps)), size
        begin = max(begin, min(until, steps))


def sum_until(warmup: Warmup | None, steps: int, whole: int, earlier: Sequence[EarlierBatch] = ()) -> int:
    """The sum of the sizes of the first so many steps."""
    return sum(_sum(warmup, end, size) - _sum(warmup, begin, size) for begin, end, size in spans(earlier, steps, whole))


def _sum(warmup: Warmup | None, steps: int, whole: int) -> int:
    sums = _rising(warmup, whole) if warmup else (0,)
    rising = min(steps, len(sums) - 1)
    return sums[rising] + (steps - rising) * whole


def steps_within(warmup: Warmup | None, total: int, whole: int, earlier: Sequence[EarlierBatch] = ()) -> int:
    """How many steps' sizes add up to at most `total`."""
    return bisect_right(range(total + 1), total, key=lambda steps: sum_until(warmup, steps, whole, earlier)) - 1


def pass_multiple(config: RunConfig, batch_size: int) -> int:
    """Sequences of which a pass over the data takes a multiple; a micro-batch of all ranks, when a run begins."""
    accumulation = config.train.accumulation or 1
    return config.data.pass_multiple or batch_size // (1 if batch_size % accumulation else accumulation)


def tokens_until(config: RunConfig, sequences: int, steps: int) -> int:
    """Tokens of the first so many steps; `sequences`: of the whole batch, both sides of pairs counted."""
    whole, total = (sequences, config.data.seq_length), 0
    warmups = config.train.batch_size_warmup, config.data.seq_length_warmup
    sides, earlier = 2 if config.train.objective in PAIRED else 1, config.train.earlier_batches
    for step in range(steps):
        size = next((span.batch_size * sides for span in earlier if step < span.until), sequences)
        now = size_at(warmups[0], step, size), size_at(warmups[1], step, whole[1])
        if now == whole and step >= max((span.until for span in earlier), default=0):
            return total + (steps - step) * prod(whole)
        total += prod(now)
    return total


def planned_dp(config: RunConfig) -> int | None:
    """Data-parallel ranks of the devices that the config declares; None if it declares none."""
    parallel = config.parallel
    return parallel.gpus // parallel.model_ranks if parallel.gpus else None


def batch_plan(config: RunConfig, dp: int = 1) -> BatchPlan:
    """The batch on `dp` data-parallel ranks; what the config leaves out is inferred.

    The step's batch belongs to the config: if the declared number of devices (`parallel.gpus`) fixes it, then another
    number of ranks changes the accumulation and never the batch. Raises ConfigError that says what would fit.
    """
    total, micro, steps = config.train.batch_size, config.train.micro_batch_size, config.train.accumulation
    warmup = config.train.batch_size_warmup
    declared = planned_dp(config) or dp
    if total is None and micro is None:
        raise ConfigError(config.place(*_PATHS) + "the batch is unknown; give train.batch_size")
    if total is None:
        assert micro is not None
        total = micro * (steps or 1) * declared
    if warmup and (total % warmup.unit or warmup.unit % ((micro or 1) * dp)):
        place = config.place(f"{_WARMUP}.start", f"{_WARMUP}.multiple", *_PATHS)
        raise ConfigError(
            f"{place}{_WARMUP}: the multiple of its batches, {warmup.unit} sequences, must divide "
            f"train.batch_size={total} and be a multiple of {_factors(config)}{dp} data-parallel ranks"
        )
    micro = micro or (warmup.unit // dp if warmup else None)
    if micro is None:
        micro = _divide(config, total, (steps or 1) * dp, dp)
    if steps is None or (dp != declared and total == micro * steps * declared):
        steps = _divide(config, total, micro * dp, dp)
    if total != micro * steps * dp:
        raise ConfigError(_contradiction(config, total, micro, steps, dp))
    return BatchPlan(total, micro, steps)


def fitting_batch(config: RunConfig, dp: int) -> RunConfig:
    """The config with the nearest train.batch_size, not below its own, that `dp` data-parallel ranks can divide.

    A micro-batch stays as it is, and the accumulation where there is none.
    """
    train = config.train
    unit = (train.micro_batch_size or train.accumulation or 1) * dp
    size = -(-(train.batch_size or unit) // unit) * unit
    accumulation = None if train.micro_batch_size else train.accumulation
    return config.with_({"train.batch_size": size, "train.accumulation": accumulation})


def _divide(config: RunConfig, total: int, parts: int, dp: int) -> int:
    if total % parts:
        lower, upper = total // parts * parts, -(-total // parts) * parts
        raise ConfigError(
            f"{config.place(*_PATHS)}train.batch_size={total} does not divide into "
            f"{_factors(config)}{dp} data-parallel ranks; "
            f"{' or '.join(str(size) for size in dict.fromkeys((lower, upper)) if size)} would fit"
        )
    return total // parts


def _contradiction(config: RunConfig, total: int, micro: int, steps: int, dp: int) -> str:
    fits = [f"train.batch_size={micro * steps * dp}"]
    if total % (micro * dp) == 0:
        fits.append(f"train.accumulation={total // (micro * dp)}")
    if total % (steps * dp) == 0:
        fits.append(f"train.micro_batch_size={total // (steps * dp)}")
    return (
        f"{config.place(*_PATHS)}train.batch_size={total} is not train.micro_batch_size={micro} * "
        f"train.accumulation={steps} * {dp} data-parallel ranks = {micro * steps * dp}; "
        f"{' or '.join(fits)} would fit, or leave one of the three out (null)"
    )


def _factors(config: RunConfig) -> str:
    return "".join(
        f"{name.replace('_', '-')} {value} * "
        for name in ("micro_batch_size", "accumulation")
        if (value := getattr(config.train, name))
    )
