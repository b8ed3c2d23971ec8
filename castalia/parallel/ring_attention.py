"""Ring attention: queries stay, keys and values travel around the ranks (Liu et al., 2310.01889).

Each rank holds an equally long slice of every sequence. In turn i it has the keys and values of the rank i places
before it: first its own, to which its queries attend causally, then earlier slices, to which they attend in full. Later
slices it only passes on, so the last rank computes the most. The table shows whose keys each rank attends to:

    turn      rank 0    rank 1    rank 2
    0         0         1         2
    1         -         0         1
    2         -         -         0
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed._functional_collectives import all_to_all_single
from torch.distributed.device_mesh import DeviceMesh

aten: Any = torch.ops.aten
FlashResult = tuple[Tensor, Tensor, tuple]  # output, log of the sum of exponentials, what the backward pass needs


def ring_attention(q: Tensor, k: Tensor, v: Tensor, mesh: DeviceMesh, scale: float | None = None) -> Tensor:
    """Causal flash attention over all ranks of a mesh: q [b, n, t, d], k and v [b, kv, t, d] -> [b, n, t, d].

    t are this rank's tokens. `scale` multiplies the scores; None: 1 / sqrt(d).
    """
    return _Ring.apply(q, k, v, mesh, scale)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mesh: DeviceMesh, scale: float | None) -> Tensor:
        ctx.mesh, ctx.scale = mesh, scale
        pairs = (pair for pair in circulate(torch.stack((k, v)), mesh) if pair is not None)
        out, sums, ctx.rest = attend_blockwise(q, pairs, scale)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums = ctx.saved_tensors
        pair = torch.stack((k, v))
        d_q, d_pair = torch.zeros_like(q, dtype=torch.float32), torch.zeros_like(pair, dtype=torch.float32)
        for turn, seen in enumerate(circulate(pair, ctx.mesh)):
            if seen is not None:
                parts = _flash_gradients(d_out, q, seen[0], seen[1], out, sums, ctx.rest, turn == 0, ctx.scale)
                d_q += parts[0]
                d_pair = d_pair + torch.stack(parts[1:])
            # The gradient travels along with its keys and values; after the last turn it is back at their rank.
            d_pair = pass_on(d_pair, ctx.mesh)
        d_k, d_v = d_pair.to(k.dtype).unbind()
        return d_q.to(q.dtype), d_k, d_v, None, None


def circulate(pair: Tensor, mesh: DeviceMesh) -> Iterator[Tensor | None]:
    """Yields keys and values [2, b, kv, t, d] turn by turn: this rank's, then those of the ranks before it.

    In turns whose keys and values come from a later rank it yields None, because causal attention does not see them.
    """
    size, rank = mesh.size(), mesh.get_local_rank()
    for turn in range(size):
        following = pass_on(pair, mesh) if turn + 1 < size else pair  # sent while this pair is attended to
        yield pair if turn <= rank else None
        pair = following


def pass_on(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Sends x to the next rank of the ring and returns the x of the rank before."""
    size, rank, flat = mesh.size(), mesh.get_local_rank(), x.contiguous().view(-1)
    # An all-to-all whose split sizes are zero for all ranks but the neighbours.
    sent, received = [0] * size, [0] * size
    sent[(rank + 1) % size] = received[(rank - 1) % size] = flat.numel()
    return all_to_all_single(flat, received, sent, mesh.get_group()).view(x.shape)


def attend_blockwise(q: Tensor, pairs: Iterator[Tensor], scale: float | None) -> FlashResult:
    """Attention of q to keys and values that arrive pair by pair; the first pair, q's own, is attended to causally.

    Partial results are merged by their log-sum-exps, as flash attention merges its blocks.
    """
    k, v = next(pairs).unbind()
    own, own_sums, rest = _flash(q, k, v, True, scale)
    out, sums = own.float(), own_sums
    for pair in pairs:
        part, part_sums, _ = _flash(q, pair[0], pair[1], False, scale)
        both = torch.logaddexp(sums, part_sums)
        out = out * (sums - both).exp()[..., None] + part * (part_sums - both).exp()[..., None]
        sums = both
    return out.to(q.dtype), sums, rest


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> FlashResult:
    if q.is_cuda:
        out, sums, *rest, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
        return out, sums, tuple(rest)
    return *aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale), ()


def _flash_gradients(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    rest: tuple,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for one pair. `out` and `sums` belong to all keys, so the pairs' gradients add up."""
    if q.is_cuda:
        *lengths, seed, offset = rest
        backward = aten._scaled_dot_product_flash_attention_backward
        return backward(d_out, q, k, v, out, sums, *lengths, 0.0, causal, seed, offset, scale=scale)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(d_out, q, k, v, out, sums, 0.0, causal, scale=scale)
