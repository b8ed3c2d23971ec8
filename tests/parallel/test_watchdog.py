"""A rank that waits for another one can be asked where it is, told to stop, and says who is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from traceback import FrameSummary

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from castalia.parallel import process_group, watchdog
from castalia.parallel.watchdog import ENDED, RankLost, Watchdog, operation, operations, wait_until
from castalia.train import loop

pytestmark = pytest.mark.xdist_group("pool")


def wait_for_rank_1():
    """A task: rank 0 waits for a collective that rank 1 comes to late. What rank 0 is told."""
    value = torch.ones(1)
    if dist.get_rank() == 1:
        time.sleep(1.0)
        dist.all_reduce(value)
        return value.item()
    work = dist.all_reduce(value, async_op=True)
    try:
        wait_until(work.is_completed, 0.2)
    except RankLost as error:
        wait_until(work.is_completed, 60.0)
        return str(error), value.item()


def test_waiting_ends_in_time_or_with_what_was_waited_for(pool):
    (error, total), other = pool.run(wait_for_rank_1, 2)
    assert error == "what was asked for has not come within 0.2 s" and total == other == 2.0


def test_waiting_lets_signals_through():
    def note(number, frame):
        raise InterruptedError

    before = signal.signal(signal.SIGUSR1, note)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    try:
        with pytest.raises(InterruptedError):
            wait_until(lambda: False, 60.0)
    finally:
        signal.signal(signal.SIGUSR1, before)


def stores():
    keeper = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return keeper, dist.PrefixStore("group", keeper)


def test_a_rank_tells_where_it_is_when_somebody_asks():
    store, group = stores()
    with Watchdog(store, group, 3, 4):
        group.set("asked", "")
        group.get("at 3")  # waits for it
    said = operations(group, [2, 3])
    assert said.startswith("rank 2 does not answer; rank 3 is in ") and "test_a_rank_tells_where" in said
    assert group.get("left 3") == b""


def test_the_machinery_of_waiting_is_not_named():
    working = FrameSummary(loop.__file__, 7, "train")
    waiting = [FrameSummary(module.__file__, 1, "wait") for module in (process_group, watchdog)]
    assert operation([working, *waiting]) == "train (loop.py:7)"


def deaf(port, what):
    """A process of two ranks, its own 0, in a call that no signal interrupts; rank 1 is not there."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    store = dist.TCPStore("127.0.0.1", port)
    group = dist.PrefixStore("group", store)
    with Watchdog(store, group, 0, 2, patience_s=0.5):
        if what == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        group.get(
            "never",
        )  # for the store's 300 seconds


@pytest.mark.parametrize(("what", "code"), [("signal", 128 + signal.SIGTERM), ("end", 2)])
def test_a_rank_that_waits_in_vain_is_ended(capfd, what, code):
    store, _ = stores()
    process = mp.get_context("spawn").Process(target=deaf, args=(store.port, what))
    process.start()
    if what == "end":
        store.set(ENDED, "")
    process.join(120)
    assert process.exitcode == code
    said = "error: SIGTERM came, but rank 1 does not answer, and rank 0 waits in deaf (test_watchdog.py:"
    assert (said in capfd.readouterr().err) == (what == "signal")
