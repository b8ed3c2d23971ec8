"""The process groups of the grid of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from castalia.parallel.rank_grid import RankGrid


@dataclass(frozen=True)
class Mesh:
    """This rank's coordinates in the grid, and the process groups along its axes."""

    layout: RankGrid
    sharding: DeviceMesh  # axes pp, dp_replicate, dp_shard (with the context ranks folded in), tp
    context: DeviceMesh  # the context ranks that share this rank's other coordinates
    pp_rank: int
    dp_rank: int
    cp_rank: int
    tp_rank: int

    @property
    def data(self) -> DeviceMesh:
        """The mesh of `fully_shard`: replicas x shards. With one replica it is one-dimensional, because a second
        dimension would mean a needless all-reduce."""
        return self.sharding["dp_shard"] if self.layout.dp_replicate == 1 else self.sharding["dp_replicate", "dp_shard"]

    @property
    def tensor(self) -> DeviceMesh:
        """The tensor-parallel ranks."""
        return self.sharding["tp"]

    @property
    def pipeline(self) -> DeviceMesh:
        """The pipeline ranks."""
        return self.sharding["pp"]


def build_mesh(layout: RankGrid, device_type: str) -> Mesh:
    """The mesh of a grid. Called on all ranks, once the process group of `layout.world` ranks exists."""
    # Two meshes over the same ranks: FSDP shards over data and context ranks alike, attention needs the latter alone.
    ranks = torch.arange(layout.world).view(layout.pp, layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp)
    folded = ranks.view(layout.pp, layout.dp_replicate, layout.dp_shard * layout.cp, layout.tp)
    sharding = DeviceMesh(device_type, folded, mesh_dim_names=("pp", "dp_replicate", "dp_shard", "tp"))
    names = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    context = DeviceMesh(device_type, ranks, mesh_dim_names=names)["cp"]
    pp, replica, shard, cp, tp = (int(i) for i in (ranks == dist.get_rank()).nonzero()[0])
    return Mesh(layout, sharding, context, pp, replica * layout.dp_shard + shard, cp, tp)
