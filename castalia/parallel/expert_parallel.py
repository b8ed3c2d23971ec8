"""Experts of a block on several ranks, each of which holds some of them."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from castalia.model.experts import ExpertMLP, Experts
from castalia.parallel.shards import local


class SplitExperts(ParallelStyle):
    """Gives each rank whole experts. Every rank routes all tokens, and computes those that its experts get.

    Outputs of the ranks are summed, or scattered, as `inside` says.
    """

    def __init__(self, inside: Placement) -> None:
        self.inside = inside

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, ExpertMLP)
        split_experts(module.experts, device_mesh)
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
        out = (
            DTensor.from_local(out, mesh, [Partial()], run_check=False)
            .redistribute(placements=[self.inside])
            .to_local()
        )
        return out if module.shared is None else out + module.gated(module.shared(whole), x)


def split_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """Gives each rank of the mesh the matrices of consecutive experts."""
    for name, parameter in list(experts.named_parameters()):
        experts.register_parameter(name, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)])))

    def matrices() -> tuple[Tensor, Tensor | None, Tensor]:
        return local(experts.up), None if experts.gate is None else local(experts.gate), local(experts.down)

    experts.matrices = matrices  # type: ignore[method-assign]
