"""How a step's batch is divided: batch size = micro-batch size * gradient accumulation * data-parallel ranks.

Batch sizes and lengths that rise over the first steps are pure functions of the step, so that a run can be resumed
without any stored state of a data loader.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import NamedTuple

from castalia.config.objective import PAIRED
from castalia.config.schema import EarlierBatch, RunConfig, Warmup
from castalia.errors import ConfigError

_WARMUP = "train.batch_size_warmup"
_PATHS = ("train.batch_size", "train.micro_batch_size", "train.accumulation")


class BatchPlan(NamedTuple):
    """The batch of a step and its division."""

    batch_size: int  # sequences of a step over all ranks
    micro_batch_size: int  # sequences of one forward pass on one rank
    accumulation: int  # forward passes of a step

    def at(self, step: int, warmup: Warmup | None) -> BatchPlan:
        """The plan of a step (from 0) while the batch size is rising: fewer forward passes of the same size."""
        size = size_at(warmup, step, self.batch_size)
        return self._replace(batch_size=size, accumulation=self.accumulation * size // self.batch_size)

    def rows_of(self, data_rank: int) -> list[int]:
        """The rows of the step's batch that one data-parallel rank trains on, micro-batch by micro-batch.

        Each micro-batch takes consecutive rows: first those of rank 0, then those of rank 1, and so on.
        """
        micro, ranks = self.micro_batch_size, self.batch_size // self.micro_batch_size // self.accumulation
        firsts = [(number * ranks + data_rank) * micro for number in range(self.accumulation)]
        return [row for first in firsts for row in range(first, first + micro)]


def size_at(warmup: Warmup | None, step: int, whole: int) -> int:
    """The size in a step (from 0): the whole, or less while it is rising."""
    return warmup.at(step, whole) if warmup else whole


@lru_cache
def _rising(warmup: Warmup, whole: int) -> tuple[int, ...]:
    """The sum of the sizes of all earlier steps, for each step up to the first one of the whole size."""
    sums = [0]  # sums[n]: sequences of the first n steps
    while (size := warmup.at(len(sums) - 1, whole)) < whole:
        sums.append(sums[-1] + size)
    return tuple(sums)


def spans(earlier: Sequence[EarlierBatch], steps: int, whole: int) -> Iterator[tuple[int, int, int]]:
    """(first step from 0, end, batch size) of each stretch of the first `steps` steps that has its own batch size."""
    begin = 0
    for until, size in (*((span.until, span.batch_size) for span in earlier), (steps, whole)):
        yield begin, max(begin, min(until, steps)), size
        begin = max(begin, min(until, steps))


def sum_until(warmup: Warmup | None, steps: int, whole: int, earlier: Sequence[EarlierBatch] = ()) -> int:
    """The sum of the sizes of the first `steps` steps."""
    return sum(_sum(warmup, end, size) - _sum(warmup, begin, size) for begin, end, size in spans(earlier, steps, whole))


def _sum(warmup: Warmup | None, steps: int, whole: int) -> int:
    # The rising part is tabulated, the rest is a product, so that the cost does not depend on the length of the run.
    sums = _rising(warmup, whole) if warmup else (0,)
    rising = min(steps, len(sums) - 1)
    return sums[rising] + (steps - rising) * whole


def steps_within(warmup: Warmup | None, total: int, whole: int, earlier: Sequence[EarlierBatch] = ()) -> int:
    """The largest number of steps whose sizes add up to at most `total`."""
    # The sums increase with the number of steps, so the number is found by bisection.
    return bisect_right(range(total + 1), total, key=lambda steps: sum_until(warmup, steps, whole, earlier)) - 1


def pass_multiple(config: RunConfig, batch_size: int) -> int:
    """A pass over the data ends at a multiple of this many sequences: one forward pass of all ranks at the start."""
    accumulation = config.train.accumulation or 1
    return config.data.pass_multiple or batch_size // (1 if batch_size % accumulation else accumulation)


def stage_length(config: RunConfig, step: int) -> int:
    """Tokens of a sequence in a step, from 0, by the stage of the data that it lies in."""
    begun = [stage for stage in config.data.stages if stage.first_step <= step + 1]
    return (begun[-1].seq_length if begun else None) or config.data.seq_length


def tokens_until(config: RunConfig, sequences: int, steps: int) -> int:
    """Tokens of the first `steps` steps. `sequences`: in the whole batch, counting both sides of pairs."""
    if config.data.stages:
        own = config.with_({"data.stages": ()})
        ends = [0, *(stage.first_step - 1 for stage in config.data.stages), steps]
        parts = [(min(begin, steps), min(end, steps)) for begin, end in pairwise(ends)]
        lengths = [stage_length(config, begin) for begin in ends[:-1]]
        # Batches do not depend on the stage, so the tokens of a step are its sequences times the stage's length.
        each = (
            (tokens_until(own, sequences, end) - tokens_until(own, sequences, begin), length)
            for (begin, end), length in zip(parts, lengths, strict=True)
        )
        return sum(tokens // config.data.seq_length * length for tokens, length in each)
    whole, total = (sequences, config.data.seq_length), 0
    warmups = config.train.batch_size_warmup, config.data.seq_length_warmup
    sides, earlier = 2 if config.train.objective in PAIRED else 1, config.train.earlier_batches
    for step in range(steps):
        size = next((span.batch_size * sides for span in earlier if step < span.until), sequences)
        now = size_at(warmups[0], step, size), size_at(warmups[1], step, whole[1])
        # From here on all steps have the same size.
        if now == whole and step >= max((span.until for span in earlier), default=0):
            return total + (steps - step) * prod(whole)
        total += prod(now)
    return total


def planned_dp(config: RunConfig) -> int | None:
    """Data-parallel ranks on the devices that `parallel.gpus` declares; None if it declares none."""
    parallel = config.parallel
    return parallel.gpus // parallel.model_ranks if parallel.gpus else None


def batch_plan(config: RunConfig, dp: int = 1) -> BatchPlan:
    """The batch on `dp` data-parallel ranks; of its three sizes, those that the config leaves out are inferred.

    The batch size of a step is fixed by the config. Where `parallel.gpus` fixes it, another number of ranks changes
    the accumulation and never the batch size. Raises ConfigError, which says which sizes would fit.
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
    # All batches of a warm-up are multiples of its unit, so one unit makes one forward pass of all ranks.
    micro = micro or (warmup.unit // dp if warmup else None)
    if micro is None:
        micro = _divide(config, total, (steps or 1) * dp, dp)
    # A given accumulation belongs to the declared number of ranks; on others it changes and the batch stays.
    if steps is None or (dp != declared and total == micro * steps * declared):
        steps = _divide(config, total, micro * dp, dp)
    if total != micro * steps * dp:
        raise ConfigError(_contradiction(config, total, micro, steps, dp))
    return BatchPlan(total, micro, steps)


def fitting_batch(config: RunConfig, dp: int) -> RunConfig:
    """The config with the smallest train.batch_size, not below its own, that divides over `dp` data-parallel ranks.

    The micro-batch size is kept or, if there is none, the accumulation.
    """
    train = config.train
    unit = (train.micro_batch_size or train.accumulation or 1) * dp  # the batch becomes a multiple of this
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
