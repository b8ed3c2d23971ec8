"""Spikes are found, and answered, alike on all ranks."""

from __future__ import annotations

import numpy as np
import pytest

from castalia.observe.metrics import read_events, read_metrics
from castalia.train.loop import train
from castalia.tune.replay import replay

pytestmark = pytest.mark.xdist_group("pool")


def run_to_the_end(config):
    """A task: the whole run, as `castalia train` does it."""
    train(config)


@pytest.mark.parametrize("layout", [["parallel.zero=1"], pytest.param(["parallel.pp=2"], marks=pytest.mark.slow)])
def test_two_ranks_go_back_together(pool, tiny, tmp_path, layout):
    """At such a threshold a change for the worse of a few percent is a spike; random bytes have some."""
    watch = ["watch.policy=rewind", "watch.window=8", "watch.threshold=0.05", "checkpoint.every=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    pool.run(run_to_the_end, 1, tiny("gpt2-tied", *watch, f"checkpoint.dir={one}"))
    pool.run(run_to_the_end, 2, tiny("gpt2-tied", *watch, f"checkpoint.dir={two}", *layout))
    events, losses = [], []
    for folder in (one, two):
        losses.append([record["loss"] for record in read_metrics(folder)])
        found = [event for event in read_events(folder) if event["event"] != "slow"]  # which is the machine's doing
        events.append([(event["event"], event["step"], event.get("back_to")) for event in found])
    assert events[0] == events[1] and "rewind" in {event for event, *_ in events[0]}
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-6)
    last = len(losses[1])
    again = pool.run(replay, 2, two, last)
    assert [rank["loss"] for rank in again] == [losses[1][-1]] * 2
