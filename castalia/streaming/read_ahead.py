"""Units in memory, of which the next ones are read by threads while the current one is used.

in use          | 0     | 1     | 2     |      two buffers: unit 2 is read into the buffer of unit 0
reading     | 0 | 1 |   | 2 |   | 3 |          as soon as that is no longer in use

For a GPU a unit is in use until it has been copied there (`device_copies.py`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from castalia.checkpoint.restore import require_finite
from castalia.plan.stream_plan import BUFFERS, PIECE_BYTES, READERS
from castalia.storage.direct import private_memory
from castalia.storage.extent import read_past_cache, verifying
from castalia.storage.lazy import TensorRef
from castalia.streaming.device_copies import DeviceCopies
from castalia.streaming.stream_units import Unit, is_read_in_rows


@dataclass
class Arrival:
    """A unit that is being read, or was."""

    number: int
    memory: Tensor | None  # bytes on the host; None for what is kept, and where only the copy on a device is left
    views: dict[str, Tensor]
    made: Any = None  # what was made of it
    copied: torch.cuda.Event | None = None  # the copy of what `memory` held before, until which nothing is read there
    copy: Tensor | None = None  # its bytes on a device
    parts: list[Future] = field(default_factory=list)
    checks: ExitStack = field(default_factory=ExitStack)  # completes the checksums of a first reading


class ReadAhead:
    """Gives units in turn, over and over. Those that do not stay in memory share two buffers."""

    def __init__(
        self,
        units: Sequence[Unit],
        stays: Collection[int],
        where: str,
        *,
        past_cache: bool = True,
        make: Callable[[int, dict[str, Tensor]], Any] | None = None,
        finite: bool = True,
        device: torch.device | None = None,
    ) -> None:
        """`stays`: numbers of the units that are read only once. `where` names the checkpoint in errors.

        `past_cache`: for units that together have no room in the page cache. `make`: turns a unit's tensors into what
        is used in their place, and what is kept of units that stay. `finite`: whether all values must be. `device`: the
        one that units are copied to; None: they are used where they were read.
        """
        self.units, self.stays, self.where, self.make, self.finite = units, frozenset(stays), where, make, finite
        self.kept: dict[int, Arrival] = {}
        self.sound: set[int] = set()  # units whose checksums and values have been found right
        streamed = [unit for number, unit in enumerate(units) if number not in self.stays]
        size = max((unit.num_bytes for unit in streamed), default=0)
        self.copies = DeviceCopies(device, size, min(BUFFERS, len(streamed))) if device else None
        # Each with the copy of what it held before, which has to be complete first. To a device all units go through
        # the buffers, those that stay there, too.
        self.free: list[tuple[Tensor, torch.cuda.Event | None]]
        if self.copies:
            largest = max((unit.num_bytes for unit in units), default=0)
            self.free = [(self.copies.host_memory(largest), None) for _ in range(min(BUFFERS, len(units)))]
        else:
            self.free = [(bytes_of_memory(size), None) for _ in range(min(BUFFERS, len(streamed)))]
        self.pending: deque[Arrival] = deque()
        self.current: Arrival | None = None
        self.readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        if past_cache:
            read_past_cache(ref for unit in units for ref in unit.tensors.values())

    def take(self, number: int) -> Any:
        """The tensors of a unit, or what was made of them, valid until another is taken.

        Raises CheckpointError for damage and for values that are not finite.
        """
        if self.current and self.current.number == number:
            return self.current.made
        if self.current:
            self._release(self.current)
        self.current = None
        if number in self.kept:
            self.current = self.kept[number]
        else:
            # Asked for out of turn, as when a pass was left in the middle: what was being read is of no use.
            if not self.pending or self.pending[0].number != number:
                self._discard()
                self._begin(number)
            self._read_on(number)  # so that the disk has work when this unit is there
            try:
                self.current = self._finished(self.pending[0])
            except Exception:
                self._discard()  # who asks again gets the same error, and not one of missing buffers
                raise
            self.pending.popleft()
        self._read_on(number)
        return self.current.made

    def measure(self) -> float:
        """Bytes per second at which the first unit is read, before it is needed."""
        started = time.perf_counter()
        self._discard()
        self._begin(0)
        for part in self.pending[0].parts:
            part.result()
        return self.units[0].num_bytes / (time.perf_counter() - started)

    def close(self) -> None:
        """Stop reading, and give all memory back."""
        self._discard()
        self.readers.shutdown()
        self.current = None
        self.free.clear()
        self.kept.clear()

    def _read_on(self, number: int) -> None:
        """Begin to read the units after this one, as far as there is memory for them."""
        last = self.pending[-1].number if self.pending else number
        for step in range(1, len(self.units)):
            following = (last + step) % len(self.units)
            if following in self.kept or following == number:
                continue
            if len(self.pending) == BUFFERS or not (self.free or self._has_own_memory(following)):
                return
            self._begin(following)

    def _has_own_memory(self, number: int) -> bool:
        """Whether the unit is read into memory that is never a buffer."""
        return number in self.stays and self.copies is None

    def _begin(self, number: int) -> None:
        unit, copied = self.units[number], None
        if self._has_own_memory(number):
            memory = bytes_of_memory(unit.num_bytes)
        else:
            memory, copied = self.free.pop(0)
        arrival = Arrival(number, memory, unit.views(memory), copied=copied)
        if number not in self.sound:
            arrival.checks.enter_context(verifying(unit.tensors.values()))
        # The largest first: begun last, it would keep one thread busy while the others wait.
        for name, view in sorted(arrival.views.items(), key=lambda item: -item[1].numel()):
            for task in tasks(unit.tensors[name], view, number in self.sound):
                arrival.parts.append(self.readers.submit(read_after, copied, *task))
        self.pending.append(arrival)

    def _finished(self, arrival: Arrival) -> Arrival:
        # Checksums are compared on leaving, before anyone sees the values.
        with arrival.checks:
            for part in arrival.parts:
                part.result()
        if arrival.number not in self.sound:
            if self.finite:
                require_finite(arrival.views, self.where)
            self.sound.add(arrival.number)
        if self.copies:
            self._copy_to_device(arrival, self.copies)
        arrival.made = self.make(arrival.number, arrival.views) if self.make else arrival.views
        if arrival.number in self.stays:
            # Without the memory itself: it lives on only if what was made of it still refers to it.
            self.kept[arrival.number] = Arrival(arrival.number, None, {}, arrival.made)
            return self.kept[arrival.number]
        return arrival

    def _copy_to_device(self, arrival: Arrival, copies: DeviceCopies) -> None:
        """Begin to copy a unit; its buffer is free again."""
        assert arrival.memory is not None
        unit = self.units[arrival.number]
        arrival.copy, copied = copies.copy(arrival.memory[: unit.num_bytes], arrival.number in self.stays)
        self.free.append((arrival.memory, copied))
        arrival.memory, arrival.views = None, unit.views(arrival.copy)

    def _release(self, arrival: Arrival) -> None:
        """A buffer can be used again; memory of a unit that stays goes with whatever still uses it."""
        if self.copies and arrival.copy is not None and arrival.number not in self.stays:
            self.copies.release(arrival.copy)
        if arrival.memory is not None and not self._has_own_memory(arrival.number):
            self.free.append((arrival.memory, arrival.copied))  # of one that was given up, nothing may have been read

    def _discard(self) -> None:
        """Give up what was being read."""
        for arrival in self.pending:
            for part in arrival.parts:
                part.cancel()
            for part in arrival.parts:
                if not part.cancelled():
                    part.exception()  # wait for it
            self._release(arrival)
        self.pending.clear()


def bytes_of_memory(size: int) -> Tensor:
    """Bytes that begin at a page, which all threads may write."""
    with torch.inference_mode(False):
        return torch.from_numpy(np.frombuffer(private_memory(size), np.uint8))


def tasks(ref: TensorRef, out: Tensor, verified: bool) -> list[tuple[TensorRef, Tensor, int]]:
    """(tensor, where its rows go, its first row) for each part that a thread reads.

    A tensor that is not verified yet is one part, because checksums are computed from beginning to end.
    """
    rows = len(out) if out.dim() else 0
    share = -(-rows // READERS)  # rounded up
    if not verified or out.nbytes < READERS * PIECE_BYTES or not is_read_in_rows(ref):
        return [(ref, out, 0)]
    return [(ref, out[start : start + share], start) for start in range(0, rows, share)]


def read_after(copied: torch.cuda.Event | None, ref: TensorRef, out: Tensor, first: int) -> None:
    """`read_in_pieces`, once the copy of what `out` held before is complete."""
    if copied:
        copied.synchronize()
    read_in_pieces(ref, out, first)


def read_in_pieces(ref: TensorRef, out: Tensor, first: int) -> None:
    """Fill `out` with rows of the tensor from `first` on. What has to be converted is small at any time."""
    if not is_read_in_rows(ref):
        ref.read(out=out)
        return
    step = max(1, PIECE_BYTES * len(out) // max(1, out.nbytes)) if ref.sources else len(out)
    for start in range(0, len(out), step):
        rows = out[start : start + step]
        ref.read([slice(first + start, first + start + len(rows))], out=rows)
