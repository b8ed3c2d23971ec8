"""What a run needs of its machines besides device memory: host memory, and cores to draw the initial weights."""

from __future__ import annotations

from dataclasses import dataclass

from castalia.config.schema import ModelConfig, RunConfig
from castalia.machine import usable_cores
from castalia.plan.count import count
from castalia.plan.devices import NODE
from castalia.plan.layout import Layout, rank_parts
from castalia.plan.memory import Compute, Rank

HALF_RING_BYTES = 256 << 20  # one of two page-locked buffers through which a GPU's tensors are saved
CORES = 8  # per GPU; rented machines have 4 to 28
# Values that one core draws per second: seeded tiles in fp64, and GPT-NeoX's stream in fp32 (benchmarks/start.py).
SEEDED_RATE, STREAM_RATE = 20e6, 150e6


@dataclass(frozen=True)
class HostMemory:
    """Bytes of host memory on the machine that needs the most, with `ranks` ranks on it."""

    ranks: int
    save: int  # copies that a save writes from, which are kept between saves, and the page-locked buffers
    offloaded: int  # master weights, optimizer state and gradients, with parallel.offload

    @property
    def total(self) -> int:
        """The sum."""
        return self.save + self.offloaded


def host_memory(config: RunConfig, model: ModelConfig, layout: Layout, compute: Compute) -> HostMemory:
    """An upper bound, as if the largest ranks shared one machine. Data loading and Python itself are not included."""
    length, saves_moments = config.data.seq_length, config.checkpoint.save_optimizer
    stages = [Rank(model, layout, stage, length, compute) for stage in rank_parts(model, layout, length)]
    together, shards = min(NODE, layout.gpus), stages[0].shards
    writers = min(together, layout.tp * layout.pp * shards)  # only one replica saves
    copies = max(4 * each.parameters + (each.moments if saves_moments else 0) for each in stages) // shards
    ring = 2 * min(HALF_RING_BYTES, copies) if compute.device == "cuda" and not layout.offload else 0
    state = max(each.masters + each.moments + 4 * each.trained for each in stages) // shards
    return HostMemory(together, writers * (copies + ring), together * state if layout.offload else 0)


@dataclass(frozen=True)
class InitialValues:
    """The time to draw the initial weights, on the rank that draws the most."""

    core_seconds: float
    cores: int  # that draw in parallel

    @property
    def seconds(self) -> float:
        """Wall-clock seconds."""
        return self.core_seconds / self.cores


def initial_values(config: RunConfig, model: ModelConfig, layout: Layout, compute: Compute) -> InitialValues | None:
    """None if weights are loaded from a checkpoint. QR decompositions of orthogonal matrices are not counted."""
    saves = config.checkpoint
    if saves.init_from or (saves.resume and not saves.starts_if_empty):
        return None
    if (
        model.init or ("neox" if config.neox_exact else "seeded")
    ) == "neox":  # one stream, of which every rank draws everything
        return InitialValues(count(model).total * model.init_passes / STREAM_RATE, 1)
    length = config.data.seq_length
    most = max(Rank(model, layout, stage, length, compute).parameters for stage in rank_parts(model, layout, length))
    cores = max(1, usable_cores() // layout.gpus) if compute.device == "cpu" else CORES
    return InitialValues(most / (layout.dp * layout.cp) / SEEDED_RATE, cores)
