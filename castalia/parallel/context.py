"""Context parallelism: each rank holds a run of every sequence; attention gathers the keys and values before it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


class GatheredKeys:
    """A cache (see `castalia.model.attention.Cache`) whose earlier tokens are those of the ranks before this one.

    Every rank needs keys and values of its own and all earlier tokens; their gradients are summed back where they
    came from. Works for any head count, grouped heads, windows and biases.
    """

    lengths = None

    def __init__(self, mesh: DeviceMesh, tokens_per_rank: int) -> None:
        self.mesh = mesh
        self.length = mesh.get_local_rank() * tokens_per_rank
        self.end = self.length + tokens_per_rank

    def reserve(self, count: int) -> Tensor:
        """The places of this rank's tokens: [1, count]."""
        return torch.arange(self.length, self.length + count)[None]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """[b, kv, t / cp, d] -> [b, kv, tokens up to this rank's last, d]."""
        both = DTensor.from_local(torch.stack((k, v)), self.mesh, [Shard(3)], run_check=False)
        k, v = both.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])[:, :, :, : self.end]
        return k, v

    def advance(self, count: int) -> None:
        """Nothing is kept from one forward pass to the next."""
