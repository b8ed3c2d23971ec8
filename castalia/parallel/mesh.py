"""The ranks of a run as a grid: pipeline, data (replicated and sharded), context and tensor ranks.

Rank order is that of the original, with the pipeline outermost: rank = ((pp * dp + data) * cp + context) * tp + tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from castalia.config.schema import Model, Parallel
from castalia.errors import ConfigError


class Layout(NamedTuple):
    """Sizes of the grid's axes, outermost first."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def dp(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    def __str__(self) -> str:
        sizes = {"PP": self.pp, "DP": self.dp, "CP": self.cp, "TP": self.tp}
        return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one process"


def layout(parallel: Parallel, world: int) -> Layout:
    """The grid that `world` ranks make. Raises ConfigError with the nearest worlds that fit."""
    model_ranks = parallel.tp * parallel.pp * parallel.cp
    if world % model_ranks:
        near = sorted({max(1, world // model_ranks) * model_ranks, (world // model_ranks + 1) * model_ranks})
        raise ConfigError(
            f"{world} processes cannot hold parallel.tp={parallel.tp} x parallel.pp={parallel.pp} x "
            f"parallel.cp={parallel.cp}: their number must be a multiple of {model_ranks}; "
            f"start {' or '.join(map(str, near))}, or change the three"
        )
    dp = world // model_ranks
    if parallel.zero == 0:
        return Layout(parallel.pp, dp, 1, parallel.cp, parallel.tp)
    replicate = parallel.dp_replicate or 1
    if dp % replicate:
        raise ConfigError(
            f"parallel.dp_replicate={replicate} does not divide the {dp} data ranks; use one of {_divisors(dp)}"
        )
    return Layout(parallel.pp, replicate, dp // replicate, parallel.cp, parallel.tp)


def check_model(cfg: Model, parallel: Parallel, seq_length: int) -> None:
    """Refuses what cannot be split as asked. Raises ConfigError naming all reasons and the nearest that works."""
    tp, stages = parallel.tp, parallel.pp * stages_per_rank(parallel)
    problems = []
    for what, size in (
        ("model.num_kv_heads", cfg.kv_heads),
        ("the MLP's width", cfg.mlp_width),
        ("the padded vocabulary", cfg.padded_vocab_size),
    ):
        if size % tp:
            remedy = f"use one of {_divisors(size)}"
            if "vocabulary" in what:
                remedy = (
                    f"set model.vocab_multiple to a multiple of {tp}, such as {_next_multiple(cfg.vocab_multiple, tp)}"
                )
            problems.append(f"parallel.tp={tp} does not divide {what}, {size}; {remedy}")
    if tp > 1 and cfg.qk_norm:
        problems.append(f"model.qk_norm is one norm over all heads, which parallel.tp={tp} would split; use tp=1")
    if stages > cfg.num_layers:
        problems.append(
            f"{stages} pipeline stages are more than model.num_layers={cfg.num_layers}; use parallel.pp <= "
            f"{max(1, cfg.num_layers // stages_per_rank(parallel))}"
        )
    split = parallel.cp * (tp if parallel.sequence_parallel else 1)
    if seq_length % split:
        problems.append(
            f"data.seq_length={seq_length} does not split over {split} context and sequence-parallel ranks; "
            f"use {_next_multiple(seq_length, split)}"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def stages_per_rank(parallel: Parallel) -> int:
    """Pipeline stages on each pipeline rank."""
    if parallel.pp == 1:
        return 1
    return parallel.stages_per_rank or (2 if parallel.pipeline in ("interleaved", "zero-bubble") else 1)


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the grid, and the process groups of its rows."""

    layout: Layout
    sharding: DeviceMesh  # axes pp, dp_replicate, dp_shard (context ranks folded in), tp
    context: DeviceMesh  # this rank's row of context ranks
    pp_rank: int
    dp_rank: int
    cp_rank: int
    tp_rank: int

    @property
    def data(self) -> DeviceMesh:
        """Where `fully_shard` lives: replicas x shards."""
        return self.sharding["dp_replicate", "dp_shard"]

    @property
    def tensor(self) -> DeviceMesh:
        return self.sharding["tp"]

    @property
    def pipeline(self) -> DeviceMesh:
        return self.sharding["pp"]


def build_mesh(layout: Layout, device_type: str) -> Mesh:
    """Needs the process group of `layout.world` ranks."""
    ranks = torch.arange(layout.world).view(layout.pp, layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp)
    folded = ranks.view(layout.pp, layout.dp_replicate, layout.dp_shard * layout.cp, layout.tp)
    sharding = DeviceMesh(device_type, folded, mesh_dim_names=("pp", "dp_replicate", "dp_shard", "tp"))
    names = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    context = DeviceMesh(device_type, ranks, mesh_dim_names=names)["cp"]
    pp, replica, shard, cp, tp = (int(i) for i in (ranks == dist.get_rank()).nonzero()[0])
    return Mesh(layout, sharding, context, pp, replica * layout.dp_shard + shard, cp, tp)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0][:12]


def _next_multiple(number: int, of: int) -> int:
    return -(-number // of) * of
