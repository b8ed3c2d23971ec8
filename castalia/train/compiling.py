"""Whether a run compiles its blocks, and from which step on. No clock decides it, so a resumed run does the same."""

from __future__ import annotations

from typing import NamedTuple

import torch

from castalia.config.schema import CompleteConfig
from castalia.parallel.compile import missing_compiler
from castalia.parallel.rank_grid import why_not_compiled
from castalia.parallel.rendezvous import world_size
from castalia.plan.flops import training_flops

EAGER_STEPS = 10  # by then the first loss has shown, and most mistakes have
# Operations on each GPU that repay compiling: four minutes or more, at 40% of an H100's rate. On an H200 compiling took
# 17 seconds for a small model and saved 11% of the time of a 1.4B's steps, 19% of a 410M's.
REPAYING = 1e17


class CompilePlan(NamedTuple):
    """What was decided, and why."""

    first: int | None  # the first compiled step (from 0); None: all are eager
    why: str


def plan_compiling(config: CompleteConfig, device: torch.device, batch_size: int) -> CompilePlan:
    """Decides for a run whose steps and vocabulary are settled; the same on all ranks."""
    wanted, missing = config.train.compile, missing_compiler(device.type)
    if wanted is True:
        return CompilePlan(0, "train.compile=true")
    if wanted is False:
        return CompilePlan(None, "train.compile=false")
    if device.type == "cpu":
        return CompilePlan(None, "compiling (train.compile=true) saves 1% to 7% of the time on CPUs")
    if missing:
        return CompilePlan(None, f"compiling would save 10% to 20% of the time, but needs {missing}")
    if why := why_not_compiled(config):
        return CompilePlan(None, f"in compiled ones {why}")
    if config.model.experts:
        return CompilePlan(None, "compiling (train.compile=true) around experts was not tried on GPUs")
    if operations_left(config, batch_size) < REPAYING:
        return CompilePlan(None, "the run is too short to repay compiling")
    return CompilePlan(EAGER_STEPS, "the run repays compiling")


def with_compiling(config: CompleteConfig, compiling: CompilePlan) -> CompleteConfig:
    """The config for building a model, with `train.compile` decided."""
    return config.with_({"train.compile": compiling.first is not None})


def operations_left(config: CompleteConfig, batch_size: int) -> float:
    """Floating-point operations that each rank still has to do after the eager steps."""
    tokens = batch_size * config.data.seq_length * (config.steps - EAGER_STEPS)
    return tokens * training_flops(config.model, config.data.seq_length) / world_size()
