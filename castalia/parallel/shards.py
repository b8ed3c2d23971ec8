"""Which part of every tensor this rank holds: for initial values, loading, saving and the gradient's norm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from castalia.parallel.executor import RankPart, leading_part


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, which shares its memory; a plain tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor) -> RankPart:
    """This rank's part of a parameter, gradient or moment, and where it begins; a plain tensor is whole.

    Of the ranks that hold equal parts, the first one along each replicated axis writes it to checkpoints.
    """
    if not isinstance(tensor, DTensor):
        return RankPart(tensor.detach(), tuple(tensor.shape), (0,) * tensor.dim(), True)
    mesh = tensor.device_mesh
    # torch's function knows uneven shards and the order of several mesh axes over one dimension.
    _, start = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    writes = all(not p.is_replicate() or i == 0 for p, i in zip(tensor.placements, coordinate, strict=True))
    return RankPart(tensor.to_local().detach(), tuple(tensor.shape), tuple(start), writes)


def sharding_of(model: torch.nn.Module) -> dict[str, tuple]:
    """How each sharded parameter lies on its mesh, by name; plain ones are left out."""
    return {name: p.placements for name, p in model.named_parameters() if isinstance(p, DTensor)}


def from_local(value: Tensor, mesh: DeviceMesh, placements: tuple) -> Tensor:
    """A sharded tensor of which `value` is this rank's part."""
    return DTensor.from_local(value, mesh, placements, run_check=False)


def with_local(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor whose part on this rank is what `change` makes of it; a plain one is changed as a whole."""
    if not isinstance(tensor, DTensor):
        return change(tensor)
    return from_local(change(tensor.to_local()), tensor.device_mesh, tensor.placements)


def whole_input(x: Tensor, mesh: DeviceMesh, inside: Placement) -> Tensor:
    """Activations that are placed as `inside`, whole on every rank. Each computes a part of what follows, so that
    their gradients are summed."""
    placed = DTensor.from_local(x, mesh, [inside], run_check=False)
    return placed.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def leaving(part: Tensor, mesh: DeviceMesh, inside: Placement) -> Tensor:
    """The sum of what all ranks give, placed as `inside`."""
    return DTensor.from_local(part, mesh, [Partial()], run_check=False).redistribute(placements=[inside]).to_local()


def num_copies(tensor: Tensor) -> int:
    """How many ranks of the tensor's mesh hold each element."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    copies = 1
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            copies *= mesh.size(axis)
    return copies


def global_gradient_norm(
    parameters: Iterable[tuple[Tensor, tuple[int, int] | None]], device: torch.device, twice: Iterable[Tensor] = ()
) -> Tensor:
    """L2 norm of all gradients over all ranks of the run, each element counted once. On `device`, without waiting.

    Each parameter comes with a limit, (dim, size): only the first `size` entries of the whole tensor in dimension `dim`
    count; None: all do. `twice` are parameters whose equal gradients two pipeline stages hold: the tied embedding.
    Called on all ranks; one without gradients contributes 0.
    """
    shared = {id(parameter) for parameter in twice}
    held: dict[int, list[Tensor]] = defaultdict(list)  # by the number of ranks that hold the same elements
    for parameter, limit in parameters:
        if parameter.grad is not None:
            counted = local(parameter.grad) if limit is None else leading_part(part(parameter.grad), limit)
            held[num_copies(parameter.grad) * (2 if id(parameter) in shared else 1)].append(counted)
    total = torch.zeros((), dtype=torch.float64, device=device)  # the device type chooses gloo or NCCL
    for copies, gradients in held.items():
        # Elements that several ranks hold enter the sum several times, so each rank adds only its share.
        norms = torch.stack(torch._foreach_norm(gradients, 2.0, dtype=torch.float64))
        total += (norms.square().sum() / copies).to(device)
    dist.all_reduce(total)
    return total.sqrt().float()
