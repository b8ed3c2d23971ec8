"""Which layouts fit on given devices, which is the fastest, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal

from castalia.config.schema import ModelConfig
from castalia.plan.devices import NODE, Device, GiB
from castalia.plan.flops import block_flops, executed_flops, head_flops
from castalia.plan.layout import Layout, bubble, problem, rank_parts
from castalia.plan.memory import Compute, Memory, Rank

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
ZERO: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
KNOBS = ("tp", "pp", "micro_batch", "zero", "recompute")  # what a layout chooses; the rest follows from the request


@dataclass(frozen=True)
class PlanRequest:
    """A model, a batch and devices for which layouts are compared."""

    model: ModelConfig
    length: int
    batch: int  # sequences of a step
    gpus: int
    device: Device
    compute: Compute
    mfu: float = 0.4  # share of the device's peak that matrix products reach without any waiting


@dataclass(frozen=True)
class Costs:
    """Seconds of a step, by cause."""

    compute: float
    traffic: float  # memory traffic: weights and gradients of each micro-batch, recomputed norms and activations
    tensor: float  # tensor-parallel all-reduces
    data: float  # data-parallel reductions and gathers that are not hidden by computation
    bubble: float  # pipeline stages that wait

    @property
    def total(self) -> float:
        """The sum."""
        return self.compute + self.traffic + self.tensor + self.data + self.bubble


@dataclass(frozen=True)
class Verdict:
    """Memory and time of a layout."""

    layout: Layout
    memory: Memory  # of the fullest stage
    stage: int  # which stage that is
    fits: bool
    costs: Costs


def evaluate_layout(job: PlanRequest, layout: Layout) -> Verdict:
    """Memory of the fullest stage and seconds of a step."""
    parts = rank_parts(job.model, layout, job.length)
    ends = {0, 1, layout.pp - 1} & set(range(layout.pp))  # the stages between hold no more than stage 1
    ranks = [Rank(job.model, layout, parts[i], job.length, job.compute) for i in sorted(ends)]
    memory, stage = max(((rank.memory(), rank.stage.index) for rank in ranks), key=lambda pair: pair[0].total)
    fits = memory.total <= job.device.usable_bytes(layout.communicators)
    return Verdict(layout, memory, stage, fits, step_costs(job, layout, ranks))


def step_costs(job: PlanRequest, layout: Layout, ranks: list[Rank]) -> Costs:
    """Seconds of a step. `ranks`: one rank of each stage that may be the slowest or fullest."""
    model, device, size = job.model, job.device, job.compute.element_bytes
    parts, length = rank_parts(model, layout, job.length), job.compute.sides * job.length  # of a sample
    block, head = block_flops(model, job.length), head_flops(model)
    slowest = max(part.layers * block + part.last * head for part in parts)
    balance = slowest * layout.pp / (model.num_layers * block + head)

    operations = executed_flops(model, job.length, layout.recompute) * layout.batch * length / layout.gpus
    compute = balance * operations / (device.peak_tflops(job.compute.precision) * 1e12 * job.mfu)
    parameters = max(rank.parameters for rank in ranks)
    layers = max(part.layers for part in parts)
    again = (
        2 * layers * ranks[0].one.again if layout.recompute == "selective" else 0
    )  # full checkpointing counts as computation
    traffic = layout.accumulation * (parameters * (3 * size + 8) + again) / (device.bandwidth * 1e9)

    tokens = layout.micro_batch * length // layout.cp
    sums = (6.0 if layout.recompute == "full" else 4.0) * layers * layout.accumulation
    if model.parallel_residual:
        sums /= 2  # attention and MLP share one all-reduce
    speed = (device.link if layout.tp <= NODE else device.network) * 1e9
    tensor = sums * 2 * (layout.tp - 1) / layout.tp * tokens * model.hidden_size * size / speed

    network = (device.network if layout.gpus > NODE else device.link) * 1e9
    share = (layout.dp - 1) / layout.dp * parameters / network
    if layout.zero == 3:  # two gathers and a reduction per micro-batch, overlapped with its computation
        data = layout.accumulation * max(0.0, share * (2 * size + 4) - compute / layout.accumulation)
    else:
        reductions = layout.accumulation if layout.zero == 2 else 1
        data = max(0.0, share * (4 * reductions + (size if layout.zero else 4)) - compute / 3 / layout.accumulation)
    busy = compute + traffic + tensor
    return Costs(compute, traffic, tensor, data, busy * bubble(layout))


def layouts(job: PlanRequest) -> Iterator[Layout]:
    """Every layout over which the model and the batch can be divided."""
    for tp in (n for n in (1, 2, 4, 8) if job.gpus % n == 0):
        for pp in (n for n in range(1, job.gpus // tp + 1) if job.gpus // tp % n == 0):
            dp = job.gpus // tp // pp
            shape = Layout(tp=tp, pp=pp, dp=dp, sequence_parallel=tp > 1)
            if job.batch % dp or problem(job.model, shape):
                continue
            for micro in (n for n in MICRO_BATCHES if job.batch // dp % n == 0):
                for zero in ZERO if dp > 1 else ZERO[:1]:
                    for recompute in RECOMPUTE:
                        accumulation = job.batch // dp // micro
                        yield replace(
                            shape, micro_batch=micro, accumulation=accumulation, zero=zero, recompute=recompute
                        )


def suggest(job: PlanRequest) -> list[Verdict]:
    """All layouts: first those that fit, fastest first, then the others by their memory."""
    verdicts = [evaluate_layout(job, layout) for layout in layouts(job)]
    return sorted(verdicts, key=lambda v: (not v.fits, round(v.costs.total, 2) if v.fits else 0, v.memory.total))


def nearest(job: PlanRequest, wanted: Layout, number: int = 3) -> list[Verdict]:
    """The layouts that fit and differ from the wanted one in the fewest settings."""

    def changes(verdict: Verdict) -> int:
        return sum(a != b for a, b in zip(_settings(verdict.layout), _settings(wanted), strict=True))

    fitting = [verdict for verdict in suggest(job) if verdict.fits]
    return sorted(fitting, key=lambda v: (changes(v), v.costs.total))[:number]


def enough(job: PlanRequest, most: int = 4096) -> int | None:
    """The smallest number of devices, doubled from the request's, on which some layout fits; None above `most`.

    The batch grows with the devices if it does not divide over them.
    """
    gpus = job.gpus
    while gpus <= most:
        batch = job.batch if job.batch % gpus == 0 else gpus
        if any(v.fits for v in suggest(replace(job, gpus=gpus, batch=batch))):
            return gpus
        gpus *= 2
    return None


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
    if slower <= 0.0005:
        return "as fast"
    reason = {
        "compute": "more computing",
        "traffic": "more memory traffic",
        "tensor": "more tensor-parallel traffic",
        "data": "more data-parallel traffic",
        "bubble": "more waiting of pipeline stages",
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
    for name in ("tp", "pp", "micro_batch"):
        changes += [(name, getattr(layout, name) // 2), (name, getattr(layout, name) * 2)]
    changes += [("zero", stage) for stage in ZERO] + [("recompute", policy) for policy in RECOMPUTE]
    for name, value in changes:
        key = tuple(value if knob == name else getattr(layout, knob) for knob in KNOBS)
        if key in possible and key != _settings(layout):
            yield f"{name.replace('_', ' ')} {value}", possible[key]


def _settings(layout: Layout) -> tuple[object, ...]:
    return tuple(getattr(layout, knob) for knob in KNOBS)
