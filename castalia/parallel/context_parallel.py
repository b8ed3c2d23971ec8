"""Context parallelism: each rank holds a run of every sequence, and attention brings the runs together.

Each way is a cache (see `castalia.model.attention.Cache`) whose other tokens are those of the other ranks. Nothing is
kept from one forward pass to the next.
"""

from __future__ import annotations

from math import lcm
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from castalia.config.attention_kernels import choose_kernel
from castalia.config.schema import ModelConfig
from castalia.errors import ConfigError
from castalia.model.attention import DTYPE_NAMES, attend, capability
from castalia.parallel.ring_attention import ring_attention


class ContextShard:
    """This rank's run of each sequence."""

    gaps = grows = False

    def __init__(self, mesh: DeviceMesh, tokens_per_rank: int) -> None:
        self.mesh = mesh
        self.start = mesh.get_local_rank() * tokens_per_rank
        self.end = self.start + tokens_per_rank

    def reserve(self, count: int) -> Tensor:
        """The places of this rank's tokens: [1, count]."""
        return torch.arange(self.start, self.end, device=self.mesh.device_type)[None]

    @property
    def keys(self) -> Tensor:
        """Whole sequences are as causal as one run: no mask has to say where the run lies in them."""
        return self.reserve(self.end - self.start)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        raise NotImplementedError

    def advance(self, count: int) -> None:
        pass


class Gather(ContextShard):
    """Every rank gets keys and values of its own and all earlier tokens; their gradients are summed back where they
    came from. Works for any head count, grouped heads, windows and biases."""

    @property
    def keys(self) -> Tensor:
        return torch.arange(self.end, device=self.mesh.device_type)[None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        both = DTensor.from_local(torch.stack((k, v)), self.mesh, [Shard(3)], run_check=False)
        k, v = both.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])[:, :, :, : self.end]
        return attend(q, k, v, **options)


class Ulysses(ContextShard):
    """Two exchanges: in between each rank holds whole sequences of its share of the heads. Plain causal attention."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        repeats = lcm(k.shape[1], self.mesh.size()) // k.shape[1]  # heads that ranks share are there for each of them
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        q, k, v = (self._exchange(x, split=1, join=2) for x in (q, k, v))
        return self._exchange(attend(q, k, v, **options), split=2, join=1)

    def _exchange(self, x: Tensor, split: int, join: int) -> Tensor:
        """[b, heads, t, d]: each rank hands out parts of one dimension and puts together what it gets along another."""
        parts = x.unflatten(split, (self.mesh.size(), -1)).movedim(split, 0).contiguous()
        parts = all_to_all_single_autograd(parts, None, None, self.mesh.get_group())
        return parts.movedim(0, join).flatten(join, join + 1)


class Ring(ContextShard):
    """Keys and values travel around the ranks. Plain causal attention by the flash kernel, without dropout."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return ring_attention(q, k, v, self.mesh, options["scale"])


CP_ATTENTION = {"gather": Gather, "ulysses": Ulysses, "ring": Ring}


def refuse_ring(cfg: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ConfigError where the ring's kernel, flash, cannot take the model's heads."""
    choice = choose_kernel(
        capability(device), DTYPE_NAMES[dtype], "causal", head_size=cfg.head_size, training=True, cudnn=False
    )
    if choice.kernel != "flash" or (device.type == "cuda" and cfg.head_size % 8):
        why = choice.why or f"heads of {cfg.head_size} are no multiple of 8"
        raise ConfigError(f"parallel.cp_kind=ring takes the flash kernel, but {why}; use parallel.cp_kind=gather")
