"""How a run is distributed over devices, and which layers each pipeline stage holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from castalia.config.layout_rules import heads_norm_problems, pipeline_problems, tensor_problems
from castalia.config.schema import ModelConfig
from castalia.plan.flops import blocks_flops, head_flops


@dataclass(frozen=True)
class Layout:
    """The parallel layout of a run, with its micro-batches."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    dp_replicate: int = 1  # copies of the sharded model among the dp ranks (HSDP)
    zero: Literal[0, 1, 2, 3] = 0
    sequence_parallel: bool = False
    micro_batch: int = 1  # sequences of one forward pass on one rank
    accumulation: int = 1  # forward passes of a step
    recompute: Literal["none", "selective", "full", "auto"] = "none"
    pipeline: Literal["gpipe", "1f1b", "interleaved", "zero-bubble"] = "1f1b"
    stages_per_rank: int = 1
    offload: bool = False  # parameters, gradients and optimizer state are in host memory
    cp_kind: Literal["gather", "ulysses", "ring"] = "gather"
    expert: int = 1  # data and context ranks that share out the experts

    @property
    def gpus(self) -> int:
        """Devices, one for each rank."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def batch(self) -> int:
        """Sequences (or pairs) of a step over all ranks."""
        return self.micro_batch * self.accumulation * self.dp

    @property
    def communicators(self) -> int:
        """Process groups with several ranks that a rank belongs to: that of all ranks and one for each mesh axis."""
        replicas = self.dp if self.zero == 0 else self.dp_replicate
        axes = [self.pp, replicas, self.dp // replicas * self.cp, self.cp, self.tp]
        if self.expert > 1:  # of experts: those that share them out, and those that hold the same ones
            axes += [self.expert, self.dp * self.cp // self.expert]
        return sum(size > 1 for size in (self.gpus, *axes))

    def __str__(self) -> str:
        names = ("tp", "pp", "cp", "dp", "expert")
        axes = " ".join(f"{n}{getattr(self, n)}" for n in names if getattr(self, n) > 1)
        return (
            f"{axes or 'one device'}, zero {self.zero}, {self.micro_batch} x {self.accumulation} sequences, "
            f"recompute {self.recompute}"
        )


@dataclass(frozen=True)
class Stage:
    """A pipeline stage of `layers` blocks; the first stage has the embedding as well, the last one the head."""

    index: int
    layers: int
    first: bool
    last: bool


def problem(model: ModelConfig, layout: Layout) -> str | None:
    """Why this model cannot be split this way, None if it can."""
    problems = (
        *tensor_problems(model, layout.tp),
        *heads_norm_problems(model, layout.tp),
        *pipeline_problems(model, layout.pp, layout.stages_per_rank),
    )
    return problems[0].text if problems else None


@lru_cache
def stages(model: ModelConfig, pp: int, length: int) -> tuple[Stage, ...]:
    """The blocks of each of `pp` stages, such that the slowest stage is as fast as possible.

    `length`: tokens of a sequence. The head counts as part of the last stage.
    """
    if pp == 1:
        return (Stage(0, model.num_layers, True, True),)
    block, head = blocks_flops(model, length) / model.num_layers, head_flops(model)

    def slowest(in_last: int) -> float:
        return max(-(-(model.num_layers - in_last) // (pp - 1)) * block, in_last * block + head)

    in_last = min(range(1, model.num_layers - pp + 2), key=lambda n: (slowest(n), -n))
    per_stage, more = divmod(model.num_layers - in_last, pp - 1)
    # Earlier stages hold activations of more micro-batches, so the remaining blocks go to later ones.
    layers = [per_stage + (stage >= pp - 1 - more) for stage in range(pp - 1)] + [in_last]
    return tuple(Stage(i, n, i == 0, i == pp - 1) for i, n in enumerate(layers))


def stages_of_rank(pipeline: str, pp: int, stages_per_rank: int, rank: int) -> list[int]:
    """The stages of a pipeline rank: rank, rank + pp, ...; with zero-bubble they are folded into a V."""
    if pipeline == "zero-bubble" and pp > 1:
        return [rank, 2 * pp - 1 - rank]
    return [rank + i * pp for i in range(stages_per_rank)]


def rank_parts(model: ModelConfig, layout: Layout, length: int) -> list[Stage]:
    """What each pipeline rank holds: its stages, counted as one."""
    cut = stages(model, layout.pp * layout.stages_per_rank, length)
    parts = []
    for rank in range(layout.pp):
        mine = [cut[i] for i in stages_of_rank(layout.pipeline, layout.pp, layout.stages_per_rank, rank)]
        layers = sum(stage.layers for stage in mine)
        parts.append(Stage(rank, layers, any(s.first for s in mine), any(s.last for s in mine)))
    return parts


def blocks_of_rank(model: ModelConfig, layout: Layout, length: int, rank: int) -> tuple[int, ...]:
    """The numbers of the blocks of a pipeline rank, lowest first."""
    cut = stages(model, layout.pp * layout.stages_per_rank, length)
    ends = [sum(stage.layers for stage in cut[: i + 1]) for i in range(len(cut))]
    mine = sorted(stages_of_rank(layout.pipeline, layout.pp, layout.stages_per_rank, rank))
    return tuple(number for i in mine for number in range(ends[i] - cut[i].layers, ends[i]))


def in_flight(layout: Layout, rank: int) -> float:
    """Largest number of micro-batches whose activations a pipeline rank holds, in units of all its layers."""
    pp, chunks = layout.pp, layout.stages_per_rank
    if pp == 1:
        return 1
    if layout.pipeline == "gpipe":
        return layout.accumulation
    if layout.pipeline == "interleaved":  # forward passes of single stages before the first backward pass
        return min(layout.accumulation, (2 * (pp - rank - 1) + (chunks - 1) * pp + 1) / chunks)
    if layout.pipeline == "zero-bubble":
        return min(layout.accumulation, pp)
    return min(layout.accumulation, pp - rank)


def bubble(layout: Layout) -> float:
    """Time that a rank waits in a step relative to the time that it computes, if all stages take equally long."""
    if layout.pipeline == "zero-bubble" and layout.accumulation >= 2 * layout.pp:
        return (layout.pp - 1) / (6 * layout.accumulation)  # one third of a stage, which is half of a rank's layers
    return (layout.pp - 1) / (layout.accumulation * layout.stages_per_rank)
