"""Checkpoints on several processes: how `generate` and `eval` start them and what they are told."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from castalia.checkpoint.tensors import Checkpoint
    from castalia.config.schema import CompleteConfig
    from castalia.parallel.inference import SplitModel


def start_processes(tp: int, pp: int, nproc: int | None) -> int:
    """The number of processes. Starts them in place of this one, if it is the first and there is to be more than one.

    As many as the layout takes, unless `nproc` or a launcher says otherwise.
    """
    from castalia.config.schema import ParallelConfig
    from castalia.parallel.launcher import relaunch
    from castalia.parallel.rank_grid import layout
    from castalia.parallel.rendezvous import world_size

    started = world_size()
    wanted = started if started > 1 else nproc or tp * pp
    layout(ParallelConfig(tp=tp, pp=pp), wanted)  # raises where so many ranks cannot be divided like this
    if wanted > started:
        relaunch(wanted, sys.argv[1:])
    return wanted


def split_config(checkpoint: Checkpoint, tp: int, pp: int, world: int, seq_length: int | None = None) -> CompleteConfig:
    """A config that says how the checkpoint's model lies on `world` ranks. ConfigError where it cannot."""
    from castalia.checkpoint.restore import architecture
    from castalia.config.schema import CompleteConfig, DataConfig, ParallelConfig
    from castalia.parallel.rank_grid import check_run

    model = architecture(checkpoint)
    config = CompleteConfig(
        model=model,
        parallel=ParallelConfig(tp=tp, pp=pp),
        data=DataConfig(seq_length=seq_length or model.max_positions or 1),
        neox_exact=checkpoint.config is not None and checkpoint.config.neox_exact,
    )
    check_run(config, world)
    return config


def load_split(checkpoint: Checkpoint, tp: int, pp: int, dtype: torch.dtype, device: torch.device) -> SplitModel:
    """This process's part of the checkpoint's model, for writing."""
    from castalia.checkpoint.restore import load_shards, require_finite
    from castalia.checkpoint.tensors import Shard
    from castalia.parallel.inference import SplitModel
    from castalia.parallel.rank_grid import layout
    from castalia.parallel.rendezvous import world_size
    from castalia.parallel.shards import part

    config = split_config(checkpoint, tp, pp, world_size())
    model = SplitModel(config.model, layout(config.parallel, world_size()), dtype, device, config.neox_exact)
    # The local tensor, the whole shape, and where the one begins in the other.
    shards = {name: Shard(*part(parameter)[:3]) for name, parameter in model.stage.named_parameters()}
    load_shards(shards, config.model, checkpoint)
    require_finite({name: shard.tensor for name, shard in shards.items()}, checkpoint.path)
    return model
