"""Mamba and RWKV blocks on several tensor ranks, each of which has some channels of the one, or heads of the other.

Within a mixer each rank computes with plain tensors, its parts of the parameters. What is equal on all ranks, such as
the mixer's input and parameters of which each has a copy, then has a gradient that is a sum over ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from castalia.config.tensor_table import tp_dim
from castalia.model.layers import Linear
from castalia.model.mamba import MambaBlock
from castalia.model.rwkv import RWKVBlock
from castalia.parallel.shards import leaving, whole_input


def split_mamba(block: MambaBlock, mesh: DeviceMesh, inside: Placement) -> None:
    """Gives each rank some channels. Steps, inputs and outputs of the scan come from all channels, and are summed.

    Activations [b, t, h] come and leave as `inside` says.
    """
    mixer = block.mamba
    mixer.width //= mesh.size()
    mixer.register_forward_pre_hook(partial(_gather_input, mesh, inside))
    _by_columns(mixer.x_proj, mesh, partial(_Sum.apply, mesh.get_group()))
    _by_columns(mixer.out, mesh, partial(leaving, mesh=mesh, inside=inside))
    _hold_parts(mixer, f"blocks.{block.layer}.mamba", mesh)


def split_rwkv(block: RWKVBlock, mesh: DeviceMesh, inside: Placement) -> None:
    """Gives each rank some heads of the time mix and some of the channel mix's inner width.

    Each computes all that a token mixes with the one before it, but for decays of other heads. Activations come and
    leave as `inside` says.
    """
    time, channels = block.rwkv.time, block.rwkv.channels
    time.heads //= mesh.size()
    time.register_forward_pre_hook(partial(_gather_input, mesh, inside))
    _by_columns(time.out, mesh, partial(leaving, mesh=mesh, inside=inside))
    # The receptance is split by its outputs, so that each rank multiplies its share of the summed values.
    channels.register_forward_pre_hook(partial(_gather_input, mesh, inside))
    _by_columns(channels.value, mesh, partial(leaving, mesh=mesh, inside=Shard(2)))
    channels.register_forward_hook(partial(_gather_output, mesh, inside))
    for name in ("time", "channels"):
        _hold_parts(getattr(block.rwkv, name), f"blocks.{block.layer}.rwkv.{name}", mesh)


def _gather_input(mesh: DeviceMesh, inside: Placement, module: nn.Module, args: tuple) -> tuple:
    """A forward pre-hook: this rank's [b, t / tp, h] -> [b, t, h].

    Where RWKV mixes over the batch, rows take the place of the sequence: what was before each is split as well.
    """
    split = 2 if inside.is_shard(0) else 1
    return (*(whole_input(x, mesh, inside) for x in args[:split]), *args[split:])


def _gather_output(mesh: DeviceMesh, inside: Placement, module: nn.Module, args: tuple, output: Any) -> Tensor:
    """A forward hook: this rank's [b, t, h / tp] -> [b, t, h], placed as `inside`."""
    return DTensor.from_local(output, mesh, [Shard(2)], run_check=False).redistribute(placements=[inside]).to_local()


def _by_columns(module: Linear, mesh: DeviceMesh, combined: Callable[[Tensor], Tensor]) -> None:
    """Lets `combined` make the output of what the columns on each rank give. One rank adds the bias."""

    def forward(x: Tensor) -> Tensor:
        bias = None if module.bias is None else module.bias * (mesh.get_local_rank() == 0)
        return combined(module.product(x, bias))

    module.forward = forward  # type: ignore[method-assign]


def _hold_parts(mixer: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """Splits all parameters of a mixer as the table of tensors says, and lets its modules compute with their parts."""
    for path, module in mixer.named_modules(prefix=name):
        for own, parameter in list(module.named_parameters(recurse=False)):
            dim = tp_dim(f"{path}.{own}")
            whole = distribute_tensor(parameter, mesh, [Replicate() if dim is None else Shard(dim)])
            module.register_parameter(own, nn.Parameter(whole, requires_grad=parameter.requires_grad))
        module.forward = partial(_with_parts, module, module.forward)  # type: ignore[method-assign]


def _with_parts(module: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    """The forward pass of a module in which its parameters are this rank's parts of them."""
    held = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    parts: dict[str, Any] = {name: _part(parameter) for name, parameter in held.items()}
    module._parameters.update(parts)
    try:
        return forward(*args)
    finally:
        module._parameters.update(held)


def _part(parameter: nn.Parameter) -> Tensor:
    assert isinstance(parameter, DTensor)
    (placement,) = parameter.placements
    return parameter.to_local(grad_placements=[Partial() if placement.is_replicate() else placement])


class _Sum(torch.autograd.Function):
    """The sum over all ranks, each of which goes on with it in another way, so that gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, part: Tensor) -> Tensor:
        ctx.group = group
        return _summed(part, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _summed(grad, ctx.group)


def _summed(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    whole = part.contiguous().clone()
    dist.all_reduce(whole, group=group)
    return whole
