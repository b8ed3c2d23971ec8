"""Copies of tensors in host memory: made while training waits, and written to disk while training continues."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from castalia.plan.host import HALF_RING_BYTES

K = TypeVar("K")
Pair = tuple[Tensor, Tensor]  # the bytes of a tensor, and where they go to: both flat, uint8


class HostCopies:
    """Memory for the copies of one set of tensors, allocated by the first copies and used again for all later ones.

    Tensors on a GPU pass through a ring of page-locked memory, which is what a GPU copies to fast and asynchronously.
    Page-locked memory is slow to allocate, is rounded up to powers of two and cannot be swapped; therefore the ring has
    only two halves, so that copying from the GPU into one half overlaps with copying from the other into ordinary
    memory.
    """

    def __init__(self) -> None:
        self.kept: dict[Any, Tensor] = {}
        self.ring: list[Tensor] = []

    @torch.no_grad()
    def take(self, tensors: Mapping[K, Tensor]) -> dict[K, Tensor]:
        """Complete copies on the CPU, in the memory of the copies that the last call returned."""
        self.kept = {name: self._place(name, tensor) for name, tensor in tensors.items()}
        on_gpu: list[Pair] = []
        for name, tensor in tensors.items():
            if tensor.is_cuda:
                on_gpu.append((_flat(tensor), _flat(self.kept[name])))
            else:
                self.kept[name].copy_(tensor)
        if on_gpu:
            self._take_ring(sum(len(source) for source, _ in on_gpu))
            copy_through(self.ring, on_gpu)
        return dict(self.kept)

    def _place(self, name: object, tensor: Tensor) -> Tensor:
        place = self.kept.get(name)
        fits = place is not None and place.shape == tensor.shape and place.dtype == tensor.dtype
        return place if place is not None and fits else torch.empty(tensor.shape, dtype=tensor.dtype)

    def _take_ring(self, num_bytes: int) -> None:
        size = min(num_bytes, HALF_RING_BYTES)
        if not self.ring or len(self.ring[0]) < size:
            self.ring = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]


def copy_through(ring: Sequence[Tensor], pairs: Iterable[Pair]) -> None:
    """Copy the first of each pair to the second through the ring: one half fills while the other is emptied."""
    before: list[tuple[Tensor, Tensor]] = []
    filled: torch.cuda.Event | None = None
    for number, load in enumerate(_loads(pairs, len(ring[0]))):
        half, now = ring[number % 2], []
        for source, target, first in load:
            now.append((half[first : first + len(source)], target))
            now[-1][0].copy_(source, non_blocking=True)
        # The copies of this half run on the GPU's stream while the other half, which is filled, is emptied.
        filling = torch.cuda.current_stream().record_event() if load[0][0].is_cuda else None
        _empty(before, filled)
        before, filled = now, filling
    _empty(before, filled)


def _empty(parts: Iterable[Pair], filled: torch.cuda.Event | None) -> None:
    if filled is not None:
        filled.synchronize()
    for part, target in parts:
        target.copy_(part)


def _loads(pairs: Iterable[Pair], size: int) -> Iterator[list[tuple[Tensor, Tensor, int]]]:
    """Pieces of the pairs in groups that fill half a ring, each as (source, target, first byte in the half)."""
    load: list[tuple[Tensor, Tensor, int]] = []
    used = 0
    for source, target in pairs:
        done = 0
        while done < len(source):
            count = min(len(source) - done, size - used)
            load.append((source[done : done + count], target[done : done + count], used))
            done, used = done + count, used + count
            if used == size:
                yield load
                load, used = [], 0
    if load:
        yield load


def _flat(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
