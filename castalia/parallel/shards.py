"""Which part of every tensor this rank holds: for initial values, loading, saving and the gradient's norm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from castalia.parallel.executor import RankPart, first


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank; it shares memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor) -> RankPart:
    """The part of a parameter, gradient or moment that lies on this rank; a plain tensor is whole."""
    if not isinstance(tensor, DTensor):
        return RankPart(tensor.detach(), tuple(tensor.shape), (0,) * tensor.dim(), True)
    mesh = tensor.device_mesh
    _, start = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    writes = all(not p.is_replicate() or i == 0 for p, i in zip(tensor.placements, coordinate, strict=True))
    return RankPart(tensor.to_local().detach(), tuple(tensor.shape), tuple(start), writes)


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

    Beside a parameter stands what counts of it: the first `size` entries of the whole in dimension `dim`; None: all.
    `twice` are parameters whose equal gradients two pipeline stages hold: the tied embedding. A rank without gradients
    takes part with 0.
    """
    shared = {id(parameter) for parameter in twice}
    held: dict[int, list[Tensor]] = defaultdict(list)  # by the number of ranks that hold the same
    for parameter, limit in parameters:
        if parameter.grad is not None:
            mine = local(parameter.grad) if limit is None else first(part(parameter.grad), limit)
            held[num_copies(parameter.grad) * (2 if id(parameter) in shared else 1)].append(mine)
    total = torch.zeros((), dtype=torch.float64, device=device)  # all ranks' on one kind: it chooses gloo or NCCL
    for copies, gradients in held.items():
        norms = torch.stack(torch._foreach_norm(gradients, 2.0, dtype=torch.float64))
        total += (norms.square().sum() / copies).to(device)
    dist.all_reduce(total)
    return total.sqrt().float()
