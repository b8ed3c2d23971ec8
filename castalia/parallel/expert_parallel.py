"""Experts of a block on several ranks, each of which holds some of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from castalia.model.experts import ExpertMLP, Experts
from castalia.model.transformer import Transformer
from castalia.parallel.shards import leaving, local


class SplitExperts(ParallelStyle):
    """Gives each rank whole experts. Every rank routes all tokens, and computes those that its experts get.

    Outputs of the ranks are summed, or scattered, as `inside` says. `exact`: gradients of experts are divided by the
    number of ranks though they are whole, as in GPT-NeoX.
    """

    def __init__(self, inside: Placement, exact: bool) -> None:
        self.inside, self.exact = inside, exact

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, ExpertMLP)
        split_experts(module.experts, device_mesh, 1 / device_mesh.size() if self.exact else 1.0)
        number = module.experts.matrices()[0].shape[0]
        module.held = slice(device_mesh.get_local_rank() * number, (device_mesh.get_local_rank() + 1) * number)
        weight = distribute_tensor(module.router.weight, device_mesh, [Replicate()])
        module.router.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
        module.forward = partial(self._forward, module, device_mesh)  # type: ignore[method-assign]
        return module

    def _forward(self, module: ExpertMLP, mesh: DeviceMesh, x: Tensor) -> Tensor:
        whole = DTensor.from_local(x, mesh, [self.inside], run_check=False).redistribute(placements=[Replicate()])
        # Each rank's experts give a part of the gradients of the input and of the router: Partial sums them up.
        rows = whole.to_local(grad_placements=[Partial()])
        router = DTensor.from_local(local(module.router.weight), mesh, [Replicate()], run_check=False)
        out = module.mixed(rows, router.to_local(grad_placements=[Partial()]))
        out = leaving(out, mesh, self.inside)
        return out if module.shared is None else out + module.gated(module.shared(whole), x)


def split_experts(experts: Experts, mesh: DeviceMesh, share: float = 1.0) -> None:
    """Gives each rank of the mesh the matrices of consecutive experts, which take this share of their gradients."""
    for name, parameter in list(experts.named_parameters()):
        experts.register_parameter(name, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)])))

    def held(parameter: nn.Parameter) -> Tensor:
        return local(parameter) if share == 1.0 else _ShareOfGradient.apply(local(parameter), share)

    def matrices() -> tuple[Tensor, Tensor | None, Tensor]:
        return held(experts.up), None if experts.gate is None else held(experts.gate), held(experts.down)

    experts.matrices = matrices  # type: ignore[method-assign]


def apply_expert_parallel(model: Transformer, mesh: DeviceMesh) -> None:
    """Gives each rank of the mesh some experts of each block. Ranks have other tokens, and send them to the experts."""
    for block in model.blocks.values():
        if isinstance(mixture := getattr(block, "mlp", None), ExpertMLP):
            split_experts(mixture.experts, mesh)
            mixture.computed = partial(computed_elsewhere, mixture.experts, mesh.get_group())  # type: ignore[method-assign]


def computed_elsewhere(experts: Experts, group: dist.ProcessGroup, rows: Tensor, counts: Tensor) -> Tensor:
    """`ExpertMLP.computed` where each rank of the group holds consecutive experts: rows go to them, and outputs back.

    Called on all ranks of the group together, each with its own rows.
    """
    ranks = dist.get_world_size(group)
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts, group=group)
    arriving = arriving.view(ranks, -1)  # [ranks, experts that are held]: how many rows come from where
    sent, received = torch.stack((counts.view(ranks, -1).sum(1), arriving.sum(1))).tolist()  # a GPU is waited for here
    got = _Exchange.apply(rows, sent, received, group)  # sorted by rank, then by expert
    held = torch.arange(arriving.shape[1], device=rows.device).repeat(ranks).repeat_interleave(arriving.flatten())
    by_expert = held.argsort(stable=True)
    out = experts(got[by_expert], arriving.sum(0))
    return _Exchange.apply(torch.empty_like(out).index_copy(0, by_expert, out), received, sent, group)


class _ShareOfGradient(torch.autograd.Function):
    """The tensor itself, which gets only a share of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad * ctx.share, None


class _Exchange(torch.autograd.Function):
    """Sends `sent[r]` consecutive rows to each rank r of a group, and gives the rows that come, `received[r]` of r."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Any) -> Tensor:
        ctx.exchange = sent, received, group
        return _exchanged(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        sent, received, group = ctx.exchange
        return _exchanged(grad, received, sent, group), None, None, None


def _exchanged(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Any) -> Tensor:
    out = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent), group=group)
    return out


def shard_dim(parameter: nn.Parameter, ranks: int) -> Shard | None:
    """The dimension of experts [e, f, h] that this many ranks share evenly, so that a part is as small as can be.

    None, the first one, for matrices, and where none divides.
    """
    if parameter.dim() < 3:
        return None
    held = local(parameter)
    even = (dim for dim in range(3) if held.shape[dim] % ranks == 0)
    return next((Shard(dim) for dim in even), None)
