"""Processes die, machines go, signals come: what `torchrun` and `--nproc` make of it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from castalia.config.load import dump_config, load_config
from castalia.observe.metrics import read_events, read_metrics
from tests.ports import free_port

pytestmark = pytest.mark.slow

CASTALIA = [sys.executable, "-m", "castalia", "train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture
def written(tiny, tmp_path):
    """A function: name of the run and overrides -> a config file and the run's folder."""

    def write(name, *overrides):
        folder = tmp_path / name
        config = tiny("neox-parallel", f"checkpoint.dir={folder}", f"data.cache_dir={tmp_path}", *overrides)
        path = tmp_path / f"{name}.yml"
        path.write_text(dump_config(config))
        return path, folder

    return write


def begin(words, **variables):
    """A process whose errors can be read from `.log`."""
    log = open(Path(os.environ.get("TMPDIR", "/tmp")) / f"castalia-test-{random.getrandbits(64):x}.log", "w+")  # noqa: SIM115
    environment = os.environ | {"OMP_NUM_THREADS": "1", **variables}
    process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment, text=True)
    os.unlink(log.name)
    process.log = log
    return process


def finish(process, seconds=300):
    """Exit code and everything that was printed."""
    try:
        code = process.wait(seconds)
    finally:
        process.kill()
    process.log.seek(0)
    return code, process.log.read()


def losses(folder):
    return [(record["step"], record["loss"]) for record in read_metrics(folder)]


def last_step(folder):
    return max((record["step"] for record in read_metrics(folder)), default=0)


def wait_for_step(process, folder, step, seconds=300):
    """Until the run has recorded a step, or is over."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if last_step(folder) >= step:
            return
        time.sleep(0.01)
    assert process.poll() is not None, f"step {step} did not come within {seconds} s"


def workers(launcher):
    """Process numbers of a launcher's ranks."""
    answer = subprocess.run(["pgrep", "-P", str(launcher.pid)], stdout=subprocess.PIPE, text=True)
    return [int(line) for line in answer.stdout.split()]


def test_twenty_kills_change_nothing(written):
    overrides = [
        "train.steps=160",
        "train.accumulation=1",
        "checkpoint.every=3",
        "checkpoint.keep_last=2",
        "parallel.zero=1",
    ]
    path, straight = written("straight", *overrides)
    code, printed = finish(begin([*CASTALIA, str(path), "--nproc", "2"]))
    assert code == 0, printed
    path, killed = written("killed", *overrides)
    draw = random.Random(1)
    launcher = begin([*TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=30", *CASTALIA[1:], str(path)])
    for _ in range(20):
        wait_for_step(launcher, killed, last_step(killed) + 1 + draw.randrange(5))
        ranks = workers(launcher)
        os.kill(draw.choice(ranks), signal.SIGKILL)
        while set(workers(launcher)) & set(ranks):
            time.sleep(0.05)
    code, printed = finish(launcher, 300)
    assert code == 0, printed[-5000:]
    assert losses(killed) == losses(straight)
    assert sum(event["event"] == "start" for event in read_events(killed)) > 15


def test_a_dead_rank_is_named_and_the_others_go_on_from_the_last_checkpoint(written):
    path, folder = written("run", "train.steps=60", "checkpoint.every=5", "parallel.tp=2")
    launcher = begin([*CASTALIA, str(path), "--nproc", "2"])
    wait_for_step(launcher, folder, 12)
    os.kill(workers(launcher)[1], signal.SIGKILL)
    code, printed = finish(launcher)
    assert code == 0, printed
    assert "rank 1 did not come to" in printed
    assert [step for step, _ in losses(folder)] == list(range(1, 61))
    starts = [event["step"] for event in read_events(folder) if event["event"] == "start"]
    assert len(starts) == 2 and starts[1] >= 5


def test_a_rank_that_hangs_is_named_with_the_operation(written):
    path, folder = written("run", "train.steps=10000", "parallel.tp=2", "parallel.timeout=20")
    launcher = begin([*TORCHRUN, "--standalone", "--nproc-per-node=2", *CASTALIA[1:], str(path)])
    wait_for_step(launcher, folder, 3)
    os.kill(workers(launcher)[1], signal.SIGSTOP)
    code, printed = finish(launcher)
    assert code != 0
    assert "error: rank 1 did not come to" in printed and "on rank 0" in printed


def test_sigterm_ends_a_rank_that_waits_for_one_that_hangs(written):
    path, folder = written("run", "train.steps=10000", "parallel.tp=2")
    words = [*TORCHRUN, "--standalone", "--nproc-per-node=2", *CASTALIA[1:], str(path)]
    launcher = begin(words, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="40")
    wait_for_step(launcher, folder, 3)
    os.kill(workers(launcher)[1], signal.SIGSTOP)
    launcher.send_signal(signal.SIGTERM)
    code, printed = finish(launcher)
    assert code != 0
    assert "error: SIGTERM came, but rank 1 does not answer, and rank 0 waits in" in printed, printed


def test_sigterm_to_the_launcher_saves_on_all_ranks(written):
    path, folder = written("run", "train.steps=10000", "parallel.tp=2", "parallel.zero=1")
    launcher = begin([*CASTALIA, str(path), "--nproc", "4"])
    wait_for_step(launcher, folder, 3)
    launcher.send_signal(signal.SIGTERM)
    code, printed = finish(launcher)
    assert code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in printed and "Traceback" not in printed
    saved = [event["step"] for event in read_events(folder) if event["event"] == "save"]
    assert saved == [losses(folder)[-1][0]]
    code, printed = finish(begin([*CASTALIA, str(folder), "train.exit_interval=1"]))
    assert code == 0, printed
    assert [step for step, _ in losses(folder)] == list(range(1, saved[0] + 2))


def test_an_error_is_printed_once_and_ends_the_job(written):
    path, folder = written("run", "train.steps=4", "parallel.tp=2")
    assert finish(begin([*CASTALIA, str(path), "--nproc", "2"]))[0] == 0
    code, printed = finish(begin([*CASTALIA, str(path), "--nproc", "2"]))
    assert code == 2
    assert printed.count("error: ") == 1 and f"{folder} holds a run" in printed and "Traceback" not in printed


def test_a_machine_goes_and_only_data_parallelism_shrinks(written):
    path, folder = written(
        "run", "train.steps=40", "train.accumulation=null", "train.micro_batch_size=4", "checkpoint.every=5"
    )
    words = [*TORCHRUN, "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
    words += [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=job", "--rdzv-conf=last_call_timeout=5,is_host="]
    first = begin([*words[:-1], words[-1] + "true", *CASTALIA[1:], str(path)])
    second = begin([*words[:-1], words[-1] + "false", *CASTALIA[1:], str(path)])
    wait_for_step(first, folder, 12)
    (rank,) = workers(second)
    second.kill()
    os.kill(rank, signal.SIGKILL)
    code, printed = finish(first)
    assert code == 0, printed
    path, straight = written("straight", "train.steps=40")
    assert finish(begin([*CASTALIA, str(path)]))[0] == 0
    assert [step for step, _ in losses(folder)] == list(range(1, 41))
    for (_, ours), (_, theirs) in zip(losses(folder), losses(straight), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert load_config(folder).train.batch_size == 16
