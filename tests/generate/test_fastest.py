import json

import pytest
import torch

from castalia.generate import fastest as measuring
from castalia.generate.fastest import fastest


class Clock:
    """A clock on which only the ways that are measured spend time."""

    def __init__(self) -> None:
        self.now, self.asked = 0.0, 0

    def perf_counter(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds

    def ways(self, **seconds: float):
        self.asked += 1
        return {name: lambda taken=taken: self.spend(taken) for name, taken in seconds.items()}


@pytest.fixture
def clock(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measuring, "time", clock := Clock())
    return clock


def test_the_fastest_way_is_taken_and_remembered(clock, tmp_path):
    assert fastest("sums", lambda: clock.ways(slow=3, quick=1, middling=2)) == "quick"
    # Later processes take the same way, whatever they would measure.
    assert fastest("sums", lambda: clock.ways(slow=1, quick=3)) == "quick"
    assert clock.asked == 1
    assert fastest("products", lambda: clock.ways(slow=1, quick=3)) == "slow"
    kept = [json.loads(path.read_text()) for path in (tmp_path / "castalia" / "fastest").iterdir()]
    assert {record["task"]: record["fastest"] for record in kept} == {"sums": "quick", "products": "slow"}


def test_ways_are_measured_in_one_thread_and_on_each_processor(clock, monkeypatch):
    threads, seen = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        assert fastest("sums", lambda: {"a": lambda: seen.append(torch.get_num_threads())}) == "a"
        assert set(seen) == {1} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(measuring, "processor_name", lambda: "another one")
    assert fastest("sums", lambda: clock.ways(b=1)) == "b"


@pytest.mark.parametrize("damage", [b"", b"[1]", b'{"fastest": 3}', b"\xff"])
def test_a_damaged_record_is_measured_anew(clock, tmp_path, damage):
    fastest("sums", lambda: clock.ways(a=1, b=2))
    (path,) = (tmp_path / "castalia" / "fastest").iterdir()
    path.write_bytes(damage)
    assert fastest("sums", lambda: clock.ways(a=2, b=1)) == "b"
    assert json.loads(path.read_text())["fastest"] == "b"


def test_a_home_that_cannot_be_written_is_no_error(clock, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fastest("sums", lambda: clock.ways(a=2, b=1)) == "b"
