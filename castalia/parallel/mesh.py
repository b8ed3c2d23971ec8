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
    expert_sharding: DeviceMesh | None  # axes pp, dp_replicate, dp_shard, expert; None: no ranks share out the experts
    pp_rank: int
    dp_rank: int
    cp_rank: int
    tp_rank: int

    @property
    def data(self) -> DeviceMesh:
        """The mesh of `fully_shard`: replicas x shards. With one replica it is one-dimensional, because a second
        dimension would mean a needless all-reduce."""
        return _replicas_and_shards(self.sharding, self.layout.dp_replicate)

    @property
    def expert_data(self) -> DeviceMesh:
        """The mesh of `fully_shard` for experts: ranks that hold the same ones."""
        assert self.expert_sharding is not None
        return _replicas_and_shards(self.expert_sharding, self.layout.expert_copies[0])

    @property
    def experts(self) -> DeviceMesh | None:
        """The ranks that share out the experts among them."""
        return None if self.expert_sharding is None else self.expert_sharding["expert"]

    @property
    def tensor(self) -> DeviceMesh:
        """The tensor-parallel ranks."""
        return self.sharding["tp"]

    @property
    def pipeline(self) -> DeviceMesh:
        """The pipeline ranks."""
        return self.sharding["pp"]


def _replicas_and_shards(mesh: DeviceMesh, replicas: int) -> DeviceMesh:
    return mesh["dp_shard"] if replicas == 1 else mesh["dp_replicate", "dp_shard"]


def build_mesh(layout: RankGrid, device_type: str) -> Mesh:
    """The mesh of a grid. Called on all ranks, once the process group of `layout.world` ranks exists."""
    # Two meshes over the same ranks: FSDP shards over data and context ranks alike, attention needs the latter alone.
    ranks = torch.arange(layout.world).view(layout.pp, layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp)
    folded = ranks.view(layout.pp, layout.dp_replicate, layout.dp_shard * layout.cp, layout.tp)
    sharding = DeviceMesh(device_type, folded, mesh_dim_names=("pp", "dp_replicate", "dp_shard", "tp"))
    names = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    context = DeviceMesh(device_type, ranks, mesh_dim_names=names)["cp"]
    expert_sharding = None
    if layout.expert > 1:  # a third one, since these ranks are some of the data and context ranks
        grid = ranks.view(layout.pp, *layout.expert_copies, layout.expert)
        expert_sharding = DeviceMesh(device_type, grid, mesh_dim_names=("pp", "dp_replicate", "dp_shard", "expert"))
    pp, replica, shard, cp, tp = (int(i) for i in (ranks == dist.get_rank()).nonzero()[0])
    return Mesh(layout, sharding, context, expert_sharding, pp, replica * layout.dp_shard + shard, cp, tp)
