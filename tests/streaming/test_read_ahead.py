"""Buffers are given back whatever happens, and not before the copies of what they held are complete."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
import torch

from castalia.errors import CheckpointError
from castalia.storage.lazy import InMemory
from castalia.streaming.device_copies import DeviceCopies
from castalia.streaming.read_ahead import ReadAhead
from castalia.streaming.stream_units import Unit


def reader_of(*values: float, device: torch.device | None = None) -> ReadAhead:
    tensors = ({f"blocks.{number}.x": InMemory(torch.full((4,), value))} for number, value in enumerate(values))
    units = [Unit(each, dict.fromkeys(each, torch.float32)) for each in tensors]
    return ReadAhead(units, (), "here", past_cache=False, device=device)


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_a_unit_that_cannot_be_used_is_told_each_time(device: torch.device | None) -> None:
    reader = reader_of(1.0, float("nan"), 3.0, 4.0, device=device)
    for _ in range(5):
        assert reader.take(0)["blocks.0.x"].tolist() == [1.0] * 4
        with pytest.raises(CheckpointError, match=r"blocks\.1\.x has 4 NaN"):
            reader.take(1)
        assert reader.take(2)["blocks.2.x"].tolist() == [3.0] * 4
    reader.close()


def test_a_buffer_that_is_given_up_still_waits_for_the_copy_of_what_it_held() -> None:
    reader = reader_of(1.0, 2.0, 3.0, device=torch.device("cpu"))
    running: Any = object()  # in place of the event of a copy on a GPU
    reader.free = [(memory, running) for memory, _ in reader.free]

    class Busy:
        """Threads that come to nothing."""

        def submit(self, *task: Any) -> Future:
            assert task[1] is running
            return Future()

    threads, reader.readers = reader.readers, Busy()  # type: ignore[assignment]
    reader._begin(0)
    reader._discard()
    assert [copied for _, copied in reader.free] == [running] * 2
    reader.readers = threads
    reader.close()


def test_new_memory_of_a_device_waits_for_what_is_still_computed_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocator gives out what was freed on the host, though kernels that use it may not have run."""
    monkeypatch.setattr(DeviceCopies, "_event", lambda copies: "now")
    copies = DeviceCopies(torch.device("cpu"), 64, 2)
    assert [place.used for place in copies.free] == ["now"] * 2
    assert copies._place(8).used == "now"
