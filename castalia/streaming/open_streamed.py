"""Whether a checkpoint's model is streamed, and the model that its plan makes of it.

work -> budget_for: is it streamed? -> units of this process's share -> plan -> StreamedTransformer
                                       the same on all ranks of a split model -> StreamedSplit
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from castalia.checkpoint.restore import architecture
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import ModelConfig
from castalia.errors import ConfigError
from castalia.machine import free_memory
from castalia.parallel.rank_grid import RankGrid
from castalia.parallel.rendezvous import world_size
from castalia.plan.stream_plan import (
    PROGRAM_BYTES,
    SHARE,
    EvaluationShape,
    StreamedSizes,
    StreamedWork,
    StreamPlan,
    evaluation_work,
    least_budget,
    memory_without_streaming,
    plan_evaluation,
    plan_stream,
)
from castalia.streaming.stream_units import ModelUnits, Share, units_of
from castalia.streaming.streamed_model import Cut, Packing, StreamedExecutor, StreamedTransformer

if TYPE_CHECKING:
    from castalia.streaming.streamed_ranks import StreamedSplit

Planner = Callable[[StreamedSizes, int], StreamPlan]  # the plan for sizes and a budget


def budget_for(
    model: ModelConfig,
    work: StreamedWork,
    element_bytes: int,
    memory: int | None,
    device: torch.device | None = None,
    grid: RankGrid | None = None,
) -> int | None:
    """Bytes for streaming on each process: `memory` if it is given, a share of what is free if it does not fit, or
    None: the model is not streamed. Of a GPU its own memory counts."""
    if memory is not None:
        return memory
    device = device or torch.device("cpu")
    free, parts = free_on(device), 1
    if grid and grid.world > 1:
        parts = grid.tp * grid.pp
        every: list[int] = [0] * grid.world
        # Processes of a machine share its memory; each has a GPU of its own.
        sharing = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE") or grid.world)
        dist.all_gather_object(every, free // sharing)
        free = min(every)  # all ranks decide alike
    needed = PROGRAM_BYTES + (memory_without_streaming(model, work, element_bytes) - PROGRAM_BYTES) // parts
    return None if needed <= free else int(SHARE * free)


def free_on(device: torch.device) -> int:
    """Bytes that are free on a GPU, or in the machine's memory."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


def cache_share(model: ModelConfig, grid: RankGrid) -> float:
    """The largest part of all keys and values that one rank holds."""
    layers = max(len(Share(rank, grid.pp).stage(model)[1]) for rank in range(grid.pp))
    return layers / model.num_layers / grid.tp


def open_streamed(
    checkpoint: Checkpoint,
    cfg: ModelConfig,
    units: ModelUnits,
    plan: StreamPlan,
    packing: Packing | None = None,
    finite: bool = True,
    device: torch.device | None = None,
    cut: Cut | None = None,
) -> StreamedTransformer:
    """The model of an opened checkpoint. Bytes that the page cache has room for are read through it.

    It raises CheckpointError for damage where it is found, and if all values must be `finite`, for others. Raises
    ConfigError for keys and values on disk, which a GPU cannot compute with.
    """
    exact = checkpoint.config is not None and checkpoint.config.neox_exact
    copies_to = device if device is not None and device.type != "cpu" else None
    if copies_to and plan.cache_on_disk:
        least = least_budget(plan.sizes, plan.work) + plan.work.cache_each
        raise ConfigError(
            f"the GPU has no room for the keys and values of one text; the least that works there is --memory "
            f"{-(-least // 10**7) / 100:.2f}GB"
        )
    # Memory that the run takes for itself is lost to the page cache.
    past_cache = plan.bytes_per_pass > free_memory() - (0 if copies_to else plan.budget)
    return StreamedTransformer(
        cfg,
        units,
        plan,
        checkpoint.path,
        exact=exact,
        past_cache=past_cache,
        packing=packing,
        finite=finite,
        device=copies_to,
        cut=cut,
    )


def streamed_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    budget: int,
    planner: Planner,
    *,
    grid: RankGrid | None = None,
    packed_item: int = 0,
    packing: Callable[[int], Packing | None] = lambda items: None,
) -> StreamedTransformer | StreamedSplit:
    """The model by the plan for a budget, on this process alone or on all ranks of a `grid` together.

    `packed_item`: bytes of a value in packed blocks; `packing`: what packs them, for so many items of a pass. Raises
    ConfigError with the smallest budget that works if this one cannot, the same on all ranks.
    """
    model = architecture(checkpoint)
    if grid is None or grid.world == 1:
        units = units_of(checkpoint, model, dtype)
        plan = planner(units.sizes(packed_item), budget)
        return open_streamed(checkpoint, model, units, plan, packing(plan.items), device=device)
    # Here because meshes and DTensor take a second to import.
    from castalia.parallel.inference import inference_mesh
    from castalia.streaming.streamed_ranks import RankCut, StreamedSplit, share_of

    mesh = inference_mesh(grid, device.type)
    # All ranks take the same items through, as many as the one with the least room.
    shares = [Share(p, grid.pp, t, grid.tp) for p in range(grid.pp) for t in range(grid.tp)]
    sizes = {share: units_of(checkpoint, model, dtype, share).sizes() for share in shares}
    narrowest = planner(max(sizes.values(), key=lambda each: each.always), budget)
    own = plan_stream(sizes[share_of(mesh)], replace(narrowest.work, wanted=narrowest.items), budget)
    plan = replace(own, work=narrowest.work, cache_on_disk=narrowest.cache_on_disk)
    units = units_of(checkpoint, model, dtype, share_of(mesh))
    return StreamedSplit(open_streamed(checkpoint, model, units, plan, device=device, cut=RankCut(mesh)), mesh)


def streamed_executor(
    checkpoint: Checkpoint,
    shape: EvaluationShape,
    dtype: torch.dtype,
    device: torch.device,
    memory: int | None,
    fewer_rows: bool,
    grid: RankGrid | None = None,
) -> StreamedExecutor | None:
    """The model with one block at a time in memory, if `memory` is given or it does not fit; else None.

    `fewer_rows`: micro-batches may have fewer windows than the shape says. `grid`: of the processes that the model is
    split over; those that share the data stream it only if `memory` says so, and are refused then.
    """
    if memory is None and world_size() > (grid.tp * grid.pp if grid else 1):
        return None
    model, item = architecture(checkpoint), dtype.itemsize
    budget = budget_for(model, evaluation_work(model, shape, item), item, memory, device, grid)
    if budget is None:
        return None

    def planner(sizes: StreamedSizes, budget: int) -> StreamPlan:
        """The plan with as many windows in a micro-batch as work."""
        return plan_evaluation(sizes, model, shape, item, budget, fewer_rows)[0]

    found = streamed_model(checkpoint, dtype, device, budget, planner, grid=grid)
    return executor_of(found)


def executor_of(model: StreamedTransformer | StreamedSplit) -> StreamedExecutor:
    """What evaluates a streamed model, with as many rows in a micro-batch as its plan says."""
    if isinstance(model, StreamedTransformer):
        return StreamedExecutor(model, model.plan.work.rows)
    from castalia.streaming.streamed_ranks import StreamedSplitExecutor

    return StreamedSplitExecutor(model, model.stage.plan.work.rows)
