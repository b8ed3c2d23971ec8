"""Whether a run's blocks are compiled and from which step on, which no clock decides: a resumed run does the same."""

from __future__ import annotations

from typing import NamedTuple

import torch

from castalia.config.schema import CompleteConfig
from castalia.parallel.compile import missing_compiler
from castalia.parallel.rank_grid import why_not_compiled
from castalia.parallel.rendezvous import world_size
from castalia.plan.flops import training_flops

EAGER_STEPS = 10  # until then the first loss, and most mistakes, have shown
# Operations on each GPU that repay compiling: four minutes or more, at 40% of an H100's rate. On an H200 compiling took
# 17 seconds for a small model and saved 11% of the time of a 1.4B's steps, 19% of a 410M's.
REPAYING = 1e17


class Compiling(NamedTuple):
    first: int | None  # the first compiled step (from 0); None: all are eager
    why: str


def plan_compiling(config: CompleteConfig, device: torch.device, batch_size: int) -> Compiling:
    """The same for all ranks; steps and vocabulary are settled."""
    wanted, missing = config.train.compile, missing_compiler(device.type)
    if wanted is True:
        return Compiling(0, "train.compile=true")
    if wanted is False:
        return Compiling(None, "train.compile=false")
    if device.type == "cpu":
        return Compiling(None, "on CPUs compiled ones take 0.93 to 0.99 of the time (train.compile=true)")
    if missing:
        return Compiling(None, f"compiled ones take 0.8 to 0.9 of the time, but need {missing}")
    if why := why_not_compiled(config):
        return Compiling(None, f"in compiled ones {why}")
    if operations_left(config, batch_size) < REPAYING:
        return Compiling(None, "the run is too short to repay compiling")
    return Compiling(EAGER_STEPS, "the run repays compiling")


def settled(config: CompleteConfig, compiling: Compiling) -> CompleteConfig:
    """The config for building a model, whose blocks are compiled or not."""
    return config.with_({"train.compile": compiling.first is not None})


def operations_left(config: CompleteConfig, batch_size: int) -> float:
    """On each rank, after the eager steps."""
    tokens = batch_size * config.data.seq_length * (config.steps - EAGER_STEPS)
    return tokens * training_flops(config.model, config.data.seq_length) / world_size()
