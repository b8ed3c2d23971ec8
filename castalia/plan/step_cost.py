"""The cost model: bytes of the fullest rank and seconds of a step, of a layout on given devices."""

from __future__ import annotations

from dataclasses import dataclass

from castalia.config.float8_matrices import float8_matrices
from castalia.config.schema import ModelConfig
from castalia.plan.devices import NODE, Device
from castalia.plan.flops import blocks_flops, float8_flops, head_flops, training_flops
from castalia.plan.layout import Layout, bubble, rank_parts
from castalia.plan.memory import Compute, Memory, Rank
from castalia.plan.recompute import choose_blocks

EFFICIENCY = 0.6  # share of a device's peak that its matrix products reach; MFU is what everything else leaves of it
USUAL_MFU = 0.4
# How often a training step moves the bytes that a block keeps for its backward pass: written, read by what follows,
# read again, and twice as gradients.
TIMES_MOVED = 5


@dataclass(frozen=True)
class PlanRequest:
    """A model, a batch and devices for which layouts are compared."""

    model: ModelConfig
    length: int
    batch: int  # sequences of a step
    gpus: int
    device: Device
    compute: Compute
    efficiency: float = EFFICIENCY


@dataclass(frozen=True)
class Costs:
    """Seconds of a step, by cause."""

    compute: float
    traffic: float  # memory traffic: weights and gradients of each micro-batch, activations
    tensor: float  # tensor-parallel all-reduces
    data: float  # data-parallel reductions and gathers that are not hidden by computation
    experts: float  # tokens on their way to experts on other ranks and back
    bubble: float  # pipeline stages that wait

    @property
    def total(self) -> float:
        """The sum."""
        return self.compute + self.traffic + self.tensor + self.data + self.experts + self.bubble


@dataclass(frozen=True)
class Verdict:
    """Memory and time of a layout."""

    layout: Layout
    memory: Memory  # of the fullest stage
    stage: int  # which stage that is
    fits: bool
    costs: Costs
    tokens: int  # of a step

    @property
    def tokens_per_second(self) -> float:
        """Of all devices, by which layouts with different batches are compared."""
        return self.tokens / self.costs.total


def evaluate_layout(job: PlanRequest, layout: Layout) -> Verdict:
    """Memory of the fullest stage and seconds of a step.

    Every time that a plan tells comes from here: the headline, suggestions, and the figures of the documentation.
    """
    ranks = fullest_ranks(job, layout)
    memory, stage = max(((rank.memory(), rank.stage.index) for rank in ranks), key=lambda pair: pair[0].total)
    tokens = layout.batch * job.compute.sides * job.length
    return Verdict(layout, memory, stage, fits(job, layout, memory), step_costs(job, layout, ranks), tokens)


def fullest_ranks(job: PlanRequest, layout: Layout) -> list[Rank]:
    """One rank of each stage that may be the fullest: the stages between hold no more than the second one."""
    parts = rank_parts(job.model, layout, job.length)
    ends = {0, 1, layout.pp - 1} & set(range(layout.pp))
    ranks = [Rank(job.model, layout, parts[i], job.length, job.compute) for i in sorted(ends)]
    return [choose_blocks(rank, job.device.usable_bytes(layout.communicators)) for rank in ranks]


def fits(job: PlanRequest, layout: Layout, memory: Memory) -> bool:
    """Whether so much memory is there on each device."""
    return memory.total <= job.device.usable_bytes(layout.communicators)


def step_costs(job: PlanRequest, layout: Layout, ranks: list[Rank]) -> Costs:
    """Seconds of a step. `ranks`: one rank of each stage that may be the slowest or fullest."""
    model, device, size = job.model, job.device, job.compute.element_bytes
    parts, length = rank_parts(model, layout, job.length), job.compute.sides * job.length  # of a sample
    block, head = blocks_flops(model, job.length) / model.num_layers, head_flops(model)
    slowest = max(part.layers * block + part.last * head for part in parts)
    balance = slowest * layout.pp / (model.num_layers * block + head)

    # The share of the blocks that are computed again in full, on the rank that does most of it.
    again = max(len(rank.again) / rank.stage.layers for rank in ranks) if layout.recompute != "full" else 1.0
    executed = training_flops(model, job.length) + again * blocks_flops(model, job.length)
    if job.compute.float8 and device.float8:  # at twice the rate
        executed -= (3 + again) * float8_flops(model) / 2
    operations = executed * layout.batch * length / layout.gpus
    compute = balance * operations / (device.peak_tflops(job.compute.precision) * 1e12 * job.efficiency)
    parameters = max(rank.parameters for rank in ranks)
    layers = max(part.layers for part in parts)
    activations = TIMES_MOVED * layers * ranks[0].one.whole * (1 + again / 3)
    if layout.recompute == "selective":
        activations += 2 * layers * ranks[0].one.again
    tokens = layout.micro_batch * length // layout.cp
    casts = layers / model.num_layers * _float8_casts(model, layout.tp, tokens) if job.compute.float8 else 0.0
    traffic = layout.accumulation * (parameters * (3 * size + 8) + activations + casts) / (device.bandwidth * 1e9)

    sums = (4 + 2 * again) * layers * layout.accumulation
    if model.parallel_residual:
        sums /= 2  # attention and MLP share one all-reduce
    speed = _collective_rate(device, layout.tp, 1)
    tensor = sums * 2 * (layout.tp - 1) / layout.tp * tokens * model.hidden_size * size / speed

    share = (layout.dp - 1) / layout.dp * parameters / _collective_rate(device, layout.dp, layout.tp * layout.cp)
    if layout.zero == 3:  # two gathers and a reduction per micro-batch, overlapped with its computation
        data = layout.accumulation * max(0.0, share * (2 * size + 4) - compute / layout.accumulation)
    else:
        reductions = layout.accumulation if layout.zero == 2 else 1
        data = max(0.0, share * (4 * reductions + (size if layout.zero else 4)) - compute / 3 / layout.accumulation)
    mixture, here = model.experts, layers * model.layer_kinds.count("moe") / model.num_layers
    there = 0.0 if mixture is None else 2 * mixture.top_k * (layout.expert - 1) / layout.expert  # and back
    travels = there * here * layout.accumulation * (2 + again)
    experts = travels * tokens * model.hidden_size * size / _collective_rate(device, layout.expert, 1)
    busy = compute + traffic + tensor + experts
    return Costs(compute, traffic, tensor, data, experts, busy * bubble(layout))


def _float8_casts(model: ModelConfig, tp: int, tokens: int) -> float:
    """Bytes that a micro-batch moves to make the operands of all float8 products.

    Inputs and gradients, in bf16, are read twice, for the largest value and for all, and their bytes are written, and
    turned for the product that gives the weight's gradient; fp32 weights so in both passes.
    """
    matrices = float8_matrices(model, tp)[0].values()
    return sum(7 * tokens * (rows + columns) + 20 * rows * columns for rows, columns in matrices)


def _collective_rate(device: Device, ranks: int, apart: int) -> float:
    """Bytes a second that each of so many ranks gets through a collective, if they are `apart` in the order of ranks.

    Those of one machine use its fast link; what passes between machines goes through the network ports of all of them.
    """
    together = max(1, NODE // apart)
    return (device.link if ranks <= together else min(device.link, together * device.network)) * 1e9
