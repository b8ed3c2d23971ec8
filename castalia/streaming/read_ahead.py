"""Units in memory, of which the next ones are read by threads while the current one is used.

in use          | 0     | 1     | 2     |      two buffers: unit 2 is read into the buffer of unit 0
reading     | 0 | 1 |   | 2 |   | 3 |          as soon as that is no longer in use
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
from castalia.streaming.stream_units import Unit, is_read_in_rows


@dataclass
class Arrival:
    """A unit that is being read, or was."""

    number: int
    memory: Tensor | None  # bytes; None for what is kept
    views: dict[str, Tensor]
    made: Any = None  # what was made of it
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
    ) -> None:
        """`stays`: numbers of the units that are read only once. `where` names the checkpoint in errors.

        `past_cache`: for units that together have no room in the page cache. `make`: turns a unit's tensors into what
        is used in their place, and what is kept of units that stay. `finite`: whether all values must be.
        """
        self.units, self.stays, self.where, self.make, self.finite = units, frozenset(stays), where, make, finite
        self.kept: dict[int, Arrival] = {}
        self.sound: set[int] = set()  # units whose checksums and values have been found right
        streamed = [unit for number, unit in enumerate(units) if number not in self.stays]
        size = max((unit.num_bytes for unit in streamed), default=0)
        self.free = [bytes_of_memory(size) for _ in range(min(BUFFERS, len(streamed)))]
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
            self.current = self._finished(self.pending.popleft())
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
            if len(self.pending) == BUFFERS or (following not in self.stays and not self.free):
                return
            self._begin(following)

    def _begin(self, number: int) -> None:
        unit = self.units[number]
        memory = bytes_of_memory(unit.num_bytes) if number in self.stays else self.free.pop()
        arrival = Arrival(number, memory, unit.views(memory))
        if number not in self.sound:
            arrival.checks.enter_context(verifying(unit.tensors.values()))
        # The largest first: begun last, it would keep one thread busy while the others wait.
        for name, view in sorted(arrival.views.items(), key=lambda item: -item[1].numel()):
            for task in tasks(unit.tensors[name], view, number in self.sound):
                arrival.parts.append(self.readers.submit(read_in_pieces, *task))
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
        arrival.made = self.make(arrival.number, arrival.views) if self.make else arrival.views
        if arrival.number in self.stays:
            # Without the memory itself: it lives on only if what was made of it still refers to it.
            self.kept[arrival.number] = Arrival(arrival.number, None, {}, arrival.made)
            return self.kept[arrival.number]
        return arrival

    def _release(self, arrival: Arrival) -> None:
        """A buffer can be used again; memory of a unit that stays goes with whatever still uses it."""
        if arrival.memory is not None and arrival.number not in self.stays:
            self.free.append(arrival.memory)

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


def read_in_pieces(ref: TensorRef, out: Tensor, first: int) -> None:
    """Fill `out` with rows of the tensor from `first` on. What has to be converted is small at any time."""
    if not is_read_in_rows(ref):
        ref.read(out=out)
        return
    step = max(1, PIECE_BYTES * len(out) // max(1, out.nbytes)) if ref.sources else len(out)
    for start in range(0, len(out), step):
        rows = out[start : start + step]
        ref.read([slice(first + start, first + start + len(rows))], out=rows)
