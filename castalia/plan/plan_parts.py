"""The parts of a plan as typed values, and the plan as the JSON object that `castalia plan --json` prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from castalia.plan.host import HostMemory, InitialValues
from castalia.plan.layout import Layout
from castalia.plan.memory import Memory
from castalia.plan.step_cost import Costs


@dataclass(frozen=True)
class ModelShape:
    """The sizes of the architecture; None while the vocabulary is unknown."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    mlp_width: int
    vocab_size: int | None
    padded_vocab_size: int | None
    hidden_per_layer: float


@dataclass(frozen=True)
class TrainingPlan:
    """The run in figures and, where a figure would say little, in words. None for what is unknown."""

    sequences_per_step: int  # or pairs, as `samples` says
    samples: str
    micro_batch: int
    accumulation: int
    data_ranks: int
    seq_length: int
    tokens_per_step: int
    steps: int | None
    rising: dict[str, tuple[int, int, int]]  # what -> first size, full size, steps until then
    tokens: int | None
    epochs: dict[str, float]  # by corpus
    first_lr: float | None
    peak_lr: float
    last_lr: float | None
    style: str
    decay_end: int | None
    warmup_steps: float | None
    warmup_tokens: float | None
    clipping: str
    precision: str
    attention: str
    determinism: str
    logged: str
    evaluated: str
    saved: str
    checkpoints_kept: int | None
    checkpoints_bytes: int | None
    free_bytes: int | None
    random_loss: float | None


@dataclass(frozen=True)
class KvCache:
    """Bytes of the key/value cache."""

    bytes_per_token: int
    bytes_per_sequence: int


@dataclass(frozen=True)
class StageMemory:
    """The memory of each rank of a pipeline stage."""

    stage: int
    layers: int
    ranks: int
    memory: Memory


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each rank, and whether they fit. None for `usable` and `fits` without devices."""

    stages: list[StageMemory]
    largest: int
    by_recompute: dict[str, int]  # of the fullest rank under each policy of activation checkpointing
    usable: int | None
    fits: bool | None
    computed_again: list[dict[str, tuple[int, int]]]  # with recompute=auto, of each stage's blocks of a kind: (n, all)


@dataclass(frozen=True)
class FlopsPlan:
    """Floating-point operations per token."""

    per_token: float
    executed_per_token: float
    neox_per_token: float  # GPT-NeoX's figure


@dataclass(frozen=True)
class TimePlan:
    """Speed and time on the devices; `seconds` of the whole run, None while its length is unknown."""

    device: str
    mfu: float  # over all devices
    tokens_per_second: float
    seconds_per_step: float
    costs: Costs  # of a step, whose sum `seconds_per_step` is
    seconds: float | None


@dataclass(frozen=True)
class SizedPlan:
    """What can only be planned with a vocabulary."""

    total: int
    active: int  # that compute one token
    by_kind: dict[str, int]
    neox_total: int  # as GPT-NeoX counts
    trained: int
    memory: MemoryPlan
    host_memory: HostMemory
    initial_values: InitialValues | None
    checkpoint: dict[str, int]
    flops: FlopsPlan
    time: TimePlan | None


@dataclass
class RunPlan:
    """Everything that follows from a config, facts about the run and devices."""

    model: ModelShape
    non_embedding: int
    layout: Layout
    training: TrainingPlan
    kv_cache: KvCache
    warnings: list[str]
    assumed: list[str]
    unknown: list[str] = field(default_factory=list)
    sized: SizedPlan | None = None  # None: the vocabulary is unknown

    def as_json(self) -> dict[str, Any]:
        """The plan as an object of JSON; what needs a vocabulary is absent without one."""
        sized = self.sized
        parameters: dict[str, Any] = {"total": sized and sized.total, "non_embedding": self.non_embedding}
        if sized:
            parameters |= {"by_kind": sized.by_kind, "as_neox_counts": sized.neox_total}
            parameters |= {"trained": sized.trained}
            parameters |= {"active": sized.active} if sized.active != sized.total else {}
        result: dict[str, Any] = {
            "model": asdict(self.model),
            "parameters": parameters,
            "layout": asdict(self.layout) | {"gpus": self.layout.gpus},
            "training": asdict(self.training),
            "kv_cache": asdict(self.kv_cache),
            "warnings": self.warnings,
            "assumed": self.assumed,
            "unknown": self.unknown,
        }
        if sized is None:
            return result
        drawn = sized.initial_values
        stages = [
            {"stage": part.stage, "layers": part.layers, "ranks": part.ranks}
            | asdict(part.memory)
            | {"total": part.memory.total}
            for part in sized.memory.stages
        ]
        return result | {
            "memory": asdict(sized.memory) | {"stages": stages},
            "host_memory": asdict(sized.host_memory) | {"total": sized.host_memory.total},
            "initial_values": drawn and asdict(drawn) | {"seconds": drawn.seconds},
            "checkpoint": sized.checkpoint,
            "flops": asdict(sized.flops),
            "time": sized.time and asdict(sized.time),
        }
