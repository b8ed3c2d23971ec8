"""Which layouts fit on given devices, which is the fastest, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal

from castalia.config.schema import ModelConfig
from castalia.plan.count import count
from castalia.plan.layout import Layout, problem
from castalia.plan.memory import Memory, Rank
from castalia.plan.step_cost import Costs, PlanRequest, Verdict, evaluate_layout, fits, fullest_ranks
from castalia.units import GiB

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
ZERO: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
# What a layout chooses; the rest follows from the request.
KNOBS = ("tp", "pp", "expert", "micro_batch", "zero", "recompute")
UNTRIED = ("cp", "cp_kind", "dp_replicate", "pipeline", "stages_per_rank", "offload")
SHOWN = 5
AS_FAST = 0.0005  # layouts whose times differ by a smaller share count as equally fast


@dataclass(frozen=True)
class Suggestions:
    """A layout, and those that would do better."""

    given: Verdict
    better: tuple[Verdict, ...]  # fit, and none is slower than the given one where that fits; the best first
    tried: int
    fitting: int
    losers: tuple[tuple[str, str], ...]  # (change of one setting of the best layout, what happens)
    enough_gpus: int | None  # on which some layout fits, where none does on those that were given


def suggestions(job: PlanRequest, given: Layout, number: int = SHOWN) -> Suggestions:
    """The fastest layouts beside the given one, and what each change of the fastest one would do."""
    ranked, own = suggest(job), evaluate_layout(job, given)
    fitting = [verdict for verdict in ranked if verdict.fits]
    least = own.tokens_per_second * (1 + AS_FAST) if own.fits else 0.0
    better = [verdict for verdict in fitting if verdict.tokens_per_second > least][:number]
    best = better[0] if better else own
    return Suggestions(
        own,
        tuple(better),
        len(ranked),
        len(fitting),
        tuple(losers(job, best)) if best.fits and not particular(best.layout) else (),
        None if fitting or own.fits else enough(job),
    )


def remedies(job: PlanRequest, given: Layout) -> Suggestions:
    """For a layout that does not fit: those that do and differ the least, or how many devices would be enough."""
    verdicts = nearest(job, given)
    enough_gpus = None if verdicts else enough(job)
    return Suggestions(evaluate_layout(job, given), tuple(verdicts), 0, len(verdicts), (), enough_gpus)


def particular(layout: Layout) -> dict[str, object]:
    """Settings of a layout that are not tried, with values other than those of all that are."""
    values = {field.name: getattr(layout, field.name) for field in fields(Layout) if field.name in UNTRIED}
    return {name: value for name, value in values.items() if value != getattr(Layout(), name)}


def layouts(job: PlanRequest) -> Iterator[Layout]:
    """Every layout over which the model and the batch can be divided."""
    for tp in (n for n in (1, 2, 4, 8) if job.gpus % n == 0):
        for pp in (n for n in range(1, job.gpus // tp + 1) if job.gpus // tp % n == 0):
            dp = job.gpus // tp // pp
            shape = Layout(tp=tp, pp=pp, dp=dp, sequence_parallel=tp > 1)
            if job.batch % dp or problem(job.model, shape):
                continue
            for micro in (n for n in MICRO_BATCHES if job.batch // dp % n == 0):
                given = replace(shape, micro_batch=micro, accumulation=job.batch // dp // micro)
                for zero in ZERO if dp > 1 else ZERO[:1]:
                    for expert in _expert_ranks(job.model, given):
                        for recompute in RECOMPUTE:
                            yield replace(given, zero=zero, expert=expert, recompute=recompute)


def _expert_ranks(model: ModelConfig, layout: Layout) -> list[int]:
    """How many of the data ranks can share out the experts; 1 where there are none, or tensor ranks share them out."""
    if model.experts is None or layout.tp > 1:
        return [1]
    return [ranks for ranks in range(1, layout.dp + 1) if layout.dp % ranks == model.experts.count % ranks == 0]


def suggest(job: PlanRequest) -> list[Verdict]:
    """All layouts: first those that fit, fastest first, then the others by their memory."""
    verdicts = [evaluate_layout(job, layout) for layout in layouts(job)]
    return sorted(verdicts, key=lambda v: (not v.fits, float(f"{v.costs.total:.3g}") if v.fits else 0, v.memory.total))


def nearest(job: PlanRequest, wanted: Layout, number: int = 3) -> list[Verdict]:
    """The layouts that fit and differ from the wanted one in the fewest settings."""

    def changes(verdict: Verdict) -> int:
        return sum(a != b for a, b in zip(_settings(verdict.layout), _settings(wanted), strict=True))

    fitting = [evaluate_layout(job, layout) for layout in fitting_layouts(job)]
    return sorted(fitting, key=lambda v: (changes(v), v.costs.total, v.memory.total))[:number]


def enough(job: PlanRequest, most: int = 4096) -> int | None:
    """The smallest number of devices, doubled from the request's, on which some layout fits; None above `most`.

    The batch grows with the devices if it does not divide over them.
    """
    gpus = job.gpus
    while gpus <= most:
        more = replace(job, gpus=gpus, batch=job.batch if job.batch % gpus == 0 else gpus)
        if next(fitting_layouts(more), None):
            return gpus
        gpus *= 2
    return None


def fitting_layouts(job: PlanRequest) -> Iterator[Layout]:
    """The layouts that fit."""
    state = 4 * (count(job.model).total + job.compute.moments.of(job.model, job.compute.finetune))
    if state > job.gpus * job.device.usable_bytes(0):
        return  # no layout divides parameters and optimizer state further than over all devices
    for layout in layouts(job):
        ranks = fullest_ranks(job, layout)
        if all(fits(job, layout, memory) for moment in (Rank.at_end, Rank.memory) for memory in map(moment, ranks)):
            yield layout


def losers(job: PlanRequest, best: Verdict) -> list[tuple[str, str]]:
    """(change, why it is worse) for each change of a single setting of the best layout."""
    return [
        (change, why_not(job, best, evaluate_layout(job, layout))) for change, layout in _neighbours(job, best.layout)
    ]


def why_not(job: PlanRequest, best: Verdict, other: Verdict) -> str:
    """Why a layout is worse than the best one: it does not fit, or what it spends more time on."""
    if not other.fits:
        (name, size), usable = binding(other.memory), job.device.usable_bytes(other.layout.communicators)
        return (
            f"does not fit: {other.memory.total / GiB:.1f} of {usable / GiB:.1f} GiB "
            f"on stage {other.stage}, {size / GiB:.1f} of them {name.replace('_', ' ')}"
        )
    extra = {f.name: getattr(other.costs, f.name) - getattr(best.costs, f.name) for f in fields(Costs)}
    slower = other.costs.total / best.costs.total - 1
    if slower <= AS_FAST:
        return "as fast"
    reason = {
        "compute": "more computing",
        "traffic": "more memory traffic",
        "tensor": "more tensor-parallel traffic",
        "data": "more data-parallel traffic",
        "bubble": "more waiting of pipeline stages",
        "experts": "more traffic of tokens to experts",
    }[max(extra, key=lambda name: extra[name])]
    return f"{slower:.1%} slower: {reason}"


def binding(memory: Memory) -> tuple[str, int]:
    """The largest category of memory and its bytes."""
    sizes = {field.name: getattr(memory, field.name) for field in fields(memory)}
    name = max(sizes, key=lambda key: sizes[key])
    return name, sizes[name]


def _neighbours(job: PlanRequest, layout: Layout) -> Iterator[tuple[str, Layout]]:
    """The possible layouts that differ in one setting, with the data ranks and the accumulation that follow from it."""
    possible = {_settings(other): other for other in layouts(job)}
    changes: list[tuple[str, object]] = []
    for name in ("tp", "pp", "expert", "micro_batch"):
        changes += [(name, getattr(layout, name) // 2), (name, getattr(layout, name) * 2)]
    changes += [("zero", stage) for stage in ZERO] + [("recompute", policy) for policy in RECOMPUTE]
    for name, value in changes:
        key = tuple(value if knob == name else getattr(layout, knob) for knob in KNOBS)
        if key in possible and key != _settings(layout):
            yield f"{name.replace('_', ' ')} {value}", possible[key]


def _settings(layout: Layout) -> tuple[object, ...]:
    return tuple(getattr(layout, knob) for knob in KNOBS)
