"""Whether a checkpoint's model is streamed, and the model that its plan makes of it."""

from __future__ import annotations

import torch

from castalia.checkpoint.restore import architecture
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import ModelConfig
from castalia.errors import ConfigError
from castalia.machine import free_memory
from castalia.parallel.rendezvous import world_size
from castalia.plan.stream_plan import (
    SHARE,
    EvaluationShape,
    StreamedWork,
    StreamPlan,
    evaluation_work,
    memory_without_streaming,
    plan_evaluation,
)
from castalia.streaming.stream_units import ModelUnits, units_of
from castalia.streaming.streamed_model import Packing, StreamedExecutor, StreamedTransformer


def budget_for(model: ModelConfig, work: StreamedWork, element_bytes: int, memory: int | None) -> int | None:
    """Bytes for streaming the model: `memory` if it is given, a share of what is free if it does not fit, or None."""
    if memory is not None:
        return memory
    free = free_memory()
    return None if memory_without_streaming(model, work, element_bytes) <= free else int(SHARE * free)


def require_cpu(device: torch.device, memory: int | None) -> bool:
    """Whether models may be streamed to this device. Raises ConfigError if they may not, but `memory` asks for it."""
    if device.type != "cpu" and memory is not None:
        raise ConfigError("--memory computes on the CPU; add train.device=cpu, or --device cpu where that is an option")
    return device.type == "cpu"


def open_streamed(
    checkpoint: Checkpoint,
    cfg: ModelConfig,
    units: ModelUnits,
    plan: StreamPlan,
    packing: Packing | None = None,
    finite: bool = True,
) -> StreamedTransformer:
    """The model of an opened checkpoint. Bytes that the page cache has room for are read through it.

    It raises CheckpointError for damage where it is found, and if all values must be `finite`, for others.
    """
    exact = checkpoint.config is not None and checkpoint.config.neox_exact
    # Memory that the run takes for itself is lost to the page cache.
    past_cache = plan.bytes_per_pass > free_memory() - plan.budget
    return StreamedTransformer(
        cfg, units, plan, checkpoint.path, exact=exact, past_cache=past_cache, packing=packing, finite=finite
    )


def streamed_executor(
    checkpoint: Checkpoint,
    shape: EvaluationShape,
    dtype: torch.dtype,
    device: torch.device,
    memory: int | None,
    fewer_rows: bool,
) -> StreamedExecutor | None:
    """The model with one block at a time in memory, if `memory` is given or it does not fit; else None.

    `fewer_rows`: micro-batches may have fewer windows than the shape says.
    """
    if world_size() > 1 or not require_cpu(device, memory):
        return None
    model = architecture(checkpoint)
    budget = budget_for(model, evaluation_work(model, shape, dtype.itemsize), dtype.itemsize, memory)
    if budget is None:
        return None
    units = units_of(checkpoint, model, dtype)
    plan, shape = plan_evaluation(units.sizes(), model, shape, dtype.itemsize, budget, fewer_rows)
    return StreamedExecutor(open_streamed(checkpoint, model, units, plan), shape.rows)
