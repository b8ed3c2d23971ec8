"""Context parallelism: each rank holds a contiguous slice of every sequence, and attention exchanges the rest.

Attention sees a context-parallel shard as it sees a KV cache (`castalia.model.attention.Cache`): tokens that are not in
this forward pass come from elsewhere. Here they come from the other ranks, and nothing is kept between forward passes.

    sequence      | 0 1 2 3 | 4 5 6 7 |
    rank          |    0    |    1    |      rank 1 attends with queries 4..7 to keys 0..7
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
    """This rank's slice of each sequence: tokens `start` to `end`, the same for all sequences."""

    gaps = grows = False  # of caches: only causality hides keys, and no text is generated

    def __init__(self, mesh: DeviceMesh, tokens_per_rank: int) -> None:
        self.mesh = mesh
        self.start = mesh.get_local_rank() * tokens_per_rank
        self.end = self.start + tokens_per_rank

    def reserve(self, count: int) -> Tensor:
        """Positions of this rank's tokens in the sequence: [1, count]."""
        return torch.arange(self.start, self.end, device=self.mesh.device_type)[None]

    @property
    def keys(self) -> Tensor:
        """Positions of the keys that a query may see. Subclasses that attend to whole sequences need no offset: causal
        attention over a whole sequence masks like that over a single slice."""
        return self.reserve(self.end - self.start)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention of this rank's queries [b, n, t, d]; keys and values are [b, kv, t, d]."""
        raise NotImplementedError

    def advance(self, count: int) -> None:
        """Nothing to do: the next forward pass begins at the same positions."""


class Gather(ContextShard):
    """All-gathers keys and values, of which each rank uses its own and all earlier tokens.

    Their gradients are summed back to the ranks that they came from. Works for any number of heads, grouped heads,
    windows and biases.
    """

    @property
    def keys(self) -> Tensor:
        """Positions of this rank's and all earlier tokens."""
        return torch.arange(self.end, device=self.mesh.device_type)[None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention to the gathered keys and values, of which those after this rank's slice are cut off."""
        both = DTensor.from_local(torch.stack((k, v)), self.mesh, [Shard(3)], run_check=False)  # [2, b, kv, t, d]
        # Each rank computes a gradient for all keys that it has seen: Partial sums them, and Shard takes them apart.
        k, v = both.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])[:, :, :, : self.end]
        return attend(q, k, v, **options)


class Ulysses(ContextShard):
    """DeepSpeed-Ulysses (2309.14509): two all-to-all exchanges, between which each rank holds whole sequences of its
    share of the heads. Causal attention without windows or biases.
    """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention over whole sequences with this rank's share of the heads."""
        # With fewer key heads than ranks several ranks need the same head, so heads are repeated.
        repeats = lcm(k.shape[1], self.mesh.size()) // k.shape[1]
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        q, k, v = (self._exchange(x, split=1, join=2) for x in (q, k, v))
        return self._exchange(attend(q, k, v, **options), split=2, join=1)  # back to all heads of this rank's tokens

    def _exchange(self, x: Tensor, split: int, join: int) -> Tensor:
        """All-to-all on [b, heads, t, d]: divides dimension `split` over the ranks and completes dimension `join`."""
        parts = x.unflatten(split, (self.mesh.size(), -1)).movedim(split, 0).contiguous()  # [ranks, ...], one for each
        parts = all_to_all_single_autograd(parts, None, None, self.mesh.get_group())
        return parts.movedim(0, join).flatten(join, join + 1)


class Ring(ContextShard):
    """Ring attention: keys and values travel around the ranks. Causal flash attention without dropout."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention to this rank's keys and values, then to those that arrive from earlier ranks."""
        return ring_attention(q, k, v, self.mesh, options["scale"])


CP_ATTENTION = {"gather": Gather, "ulysses": Ulysses, "ring": Ring}


def refuse_ring(cfg: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ConfigError where ring attention's kernel, flash attention, cannot take the model's heads."""
    choice = choose_kernel(
        capability(device), DTYPE_NAMES[dtype], "causal", head_size=cfg.head_size, training=True, cudnn=False
    )
    if choice.kernel != "flash" or (device.type == "cuda" and cfg.head_size % 8):
        why = choice.why or f"heads of {cfg.head_size} are not a multiple of 8"
        raise ConfigError(f"parallel.cp_kind=ring takes the flash kernel, but {why}; use parallel.cp_kind=gather")
