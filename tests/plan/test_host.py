"""Host memory of a run's machines, and the time until there are initial values."""

from __future__ import annotations

import pytest

from castalia.config.load import load_config
from castalia.plan.devices import DEVICES
from castalia.plan.host import CORES, HALF_RING_BYTES, SEEDED_RATE, STREAM_RATE, initial_values
from castalia.plan.plan_parts import SizedPlan
from castalia.plan.run_plan import Hardware, RunFacts, default_compute, described, layout_of, report


def plan(name: str, gpus: int, *overrides: str, device: str = "h100") -> SizedPlan:
    config = load_config(name, ["model.vocab_size=50277", *overrides])
    sized = report(config, RunFacts(), Hardware(gpus, DEVICES[device])).sized
    assert sized is not None
    return sized


def test_a_saves_copies_are_those_of_a_machine_with_its_rings() -> None:
    """12 bytes a parameter, wherever they are; replicas have none."""
    whole = plan("pythia-1.4b", 1).checkpoint["full"]
    for gpus, writers, zero in ((1, 1, 1), (8, 8, 1), (16, 8, 3), (8, 1, 0)):
        host = plan("pythia-1.4b", gpus, f"parallel.zero={zero}", "train.micro_batch_size=1").host_memory
        share = whole if zero == 0 else whole * min(8, gpus) // gpus
        assert host.save == pytest.approx(share + writers * 2 * HALF_RING_BYTES, abs=8)
        assert host.total == host.save and host.ranks == min(8, gpus)
    slim = plan("pythia-1.4b", 1, "checkpoint.save_optimizer=false").host_memory.save
    assert slim == whole // 3 + 2 * HALF_RING_BYTES


def test_offloaded_state_is_in_host_memory_and_needs_no_ring() -> None:
    words = ("parallel.zero=3", "parallel.offload=true", "train.micro_batch_size=1")
    host, parameters = plan("pythia-1.4b", 8, *words).host_memory, plan("pythia-1.4b", 1).total
    assert host.save == pytest.approx(12 * parameters, abs=8 * 8)
    assert host.offloaded == pytest.approx(16 * parameters, abs=8 * 8)


def test_the_time_of_initial_values() -> None:
    def drawn(*words: str, gpus: int = 8):
        config = load_config("pythia-1.4b", ["model.vocab_size=50277", "train.micro_batch_size=1", *words])
        layout, _ = layout_of(config, gpus)
        return initial_values(config, described(config), layout, default_compute(config, None))

    parameters = plan("pythia-1.4b", 1).total
    for words in (["parallel.zero=0"], ["parallel.zero=3"]):  # replicas share the work, too
        found = drawn(*words)
        assert found.core_seconds == pytest.approx(parameters / 8 / SEEDED_RATE) and found.cores == CORES
    assert drawn(gpus=1).seconds == pytest.approx(parameters / SEEDED_RATE / CORES)
    stream = drawn("model.init=neox", "model.init_passes=2")
    assert stream.seconds == pytest.approx(2 * parameters / STREAM_RATE)
    assert drawn("checkpoint.init_from=somewhere") is None and drawn("checkpoint.resume=somewhere") is None
