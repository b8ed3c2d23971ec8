"""Two buffers on a GPU: one is computed with while the next block is copied into the other, on a stream of its own.

copies     |  1  |  2  |     |  3  |          block 3 goes where block 1 was, as soon as that has been computed with
computing        |  1  |   2 |     |  3  |
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


class DevicePlace(NamedTuple):
    """Bytes on the device, and when they may be written; None: at once."""

    memory: Tensor
    used: torch.cuda.Event | None


class DeviceCopies:
    """Copies of units on a device. On CPUs, where only tests make them, they are plain copies."""

    def __init__(self, device: torch.device, num_bytes: int, places: int) -> None:
        """`num_bytes`: of the largest unit that does not stay; `places`: how many of them there is room for."""
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.free = [self._place(num_bytes) for _ in range(places)]

    def memory(self, num_bytes: int) -> Tensor:
        """New bytes on the device, which anyone may write."""
        with torch.inference_mode(False):
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def host_memory(self, num_bytes: int) -> Tensor:
        """Page-locked bytes, from which copies run beside the computation."""
        with torch.inference_mode(False):
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.stream is not None)

    def copy(self, source: Tensor, stays: bool) -> tuple[Tensor, torch.cuda.Event | None]:
        """A copy of host bytes, with which computing may begin at once, and when `source` may be written again.

        What `stays` gets memory of its own; all else is given back by `release`.
        """
        # Of the free ones that which has waited longest.
        place = self._place(len(source)) if stays else self.free.pop(0)
        with self._aside():
            if self.stream and place.used:
                self.stream.wait_event(place.used)
            with torch.inference_mode(False):
                place.memory[: len(source)].copy_(source, non_blocking=True)
            copied = self._event()
        if copied:
            torch.cuda.current_stream(self.device).wait_event(copied)
        return place.memory, copied

    def release(self, memory: Tensor) -> None:
        """The bytes may be written again, once everything that was begun with them has been computed."""
        self.free.append(DevicePlace(memory, self._event()))

    def _place(self, num_bytes: int) -> DevicePlace:
        """New bytes. They may have been those of a tensor that the device is still to compute with."""
        return DevicePlace(self.memory(num_bytes), self._event())

    def _aside(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    def _event(self) -> torch.cuda.Event | None:
        if self.stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event
