"""What a run asks of its machines beside the memory of their devices: host memory, and cores for the first weights."""

from __future__ import annotations

import os
from dataclasses import dataclass

from castalia.config.schema import ModelConfig, RunConfig
from castalia.plan.count import count
from castalia.plan.devices import NODE
from castalia.plan.layout import Layout, rank_parts
from castalia.plan.memory import Compute, Rank

HALF_RING_BYTES = 256 << 20  # page-locked, twice: by its way what is to be saved leaves a GPU
CORES = 8  # for each GPU: what machines are rented with has 4 to 28
# Values a second that one core draws: in fp64, tile by tile; and GPT-NeoX's one stream in fp32. benchmarks/start.py
SEEDED_RATE, STREAM_RATE = 20e6, 150e6


@dataclass(frozen=True)
class HostMemory:
    """Bytes on the machine that needs the most, whose ranks are as many as share its fast link."""

    ranks: int
    save: int  # the copies that a save writes from, kept from save to save, and the rings
    offloaded: int  # masters, moments and gradients that are here instead of on devices

    @property
    def total(self) -> int:
        return self.save + self.offloaded


def host_memory(config: RunConfig, model: ModelConfig, layout: Layout, compute: Compute) -> HostMemory:
    """At most: the ranks that hold the most are taken to be on one machine. Loader and Python come on top."""
    length, saves_moments = config.data.seq_length, config.checkpoint.save_optimizer
    stages = [Rank(model, layout, stage, length, compute) for stage in rank_parts(model, layout, length)]
    together, shards = min(NODE, layout.gpus), stages[0].shards
    writers = min(together, layout.tp * layout.pp * shards)  # replicas save nothing
    copies = max(4 * each.parameters + (each.moments if saves_moments else 0) for each in stages) // shards
    ring = 2 * min(HALF_RING_BYTES, copies) if compute.device == "cuda" and not layout.offload else 0
    state = max(each.masters + each.moments + 4 * each.trained for each in stages) // shards
    return HostMemory(together, writers * (copies + ring), together * state if layout.offload else 0)


@dataclass(frozen=True)
class InitialValues:
    """How long the rank that draws the most random values takes."""

    core_seconds: float
    cores: int  # that draw at once

    @property
    def seconds(self) -> float:
        return self.core_seconds / self.cores


def initial_values(config: RunConfig, model: ModelConfig, layout: Layout, compute: Compute) -> InitialValues | None:
    """None where weights come from a checkpoint. Decompositions for orthogonal matrices are not counted."""
    saves = config.checkpoint
    if saves.init_from or (saves.resume and not saves.starts_if_empty):
        return None
    if (model.init or ("neox" if config.neox_exact else "seeded")) == "neox":  # every rank draws the whole stream
        return InitialValues(count(model).total * model.init_passes / STREAM_RATE, 1)
    length = config.data.seq_length
    most = max(Rank(model, layout, stage, length, compute).parameters for stage in rank_parts(model, layout, length))
    cores = max(1, (os.cpu_count() or 1) // layout.gpus) if compute.device == "cpu" else CORES
    return InitialValues(most / (layout.dp * layout.cp) / SEEDED_RATE, cores)
