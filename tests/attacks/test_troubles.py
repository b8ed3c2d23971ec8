"""Signals, a rank that stops or computes nonsense, too little memory: each survivor says so in one line, and ends.

What was saved stays whole, and the run goes on to where it would have come undisturbed.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.attacks.scenes import SCENES, Theatre, differences, snapshot
from tests.attacks.stage import Done

STOPS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
RUNS = ("train", "train on 2 ranks, dp", "train on 2 ranks, ZeRO 1", "train on 2 ranks, tp")
SAVED = re.compile(r"run/checkpoints/(step_\d+)/")


def goes_on(theatre: Theatre, name: str, last: dict[str, str] | None = None) -> list[str]:
    """What differs in the end from an undisturbed run; a signal may have added a checkpoint."""
    scene, last = SCENES[name], last or theatre.open(name)[1]
    assert scene.again is not None
    done = theatre.stage.run(scene.again(theatre.work) or (), theatre.work, ranks=scene.ranks)
    if done.code != 0:
        return [f"does not go on ({done.code}): {done.said[-700:]}"]
    return differences(last, without_others(snapshot(theatre.work), last))


def without_others(found: Mapping[str, str], last: Mapping[str, str]) -> dict[str, str]:
    """Without the checkpoints of steps that an undisturbed run does not save."""
    steps = {match[1] for path in last if (match := SAVED.match(path))}
    return {path: digest for path, digest in found.items() if not (m := SAVED.match(path)) or m[1] in steps}


def errors(done: Done) -> list[str]:
    return [line for line in done.said.splitlines() if line.startswith("error: ")]


def stop(theatre: Theatre, name: str, signal_name: str, number: int) -> list[str]:
    """A signal to all ranks before an operation of rank 0."""
    scene = SCENES[name]
    theatre.set_up([name])
    done = theatre.stage.run(scene.words, theatre.work, signal_name, number, scene.ranks)
    stopped = signal.Signals[signal_name]
    wrong = []
    # 0: all was done; negative: nothing had been begun, or what was to be saved is; 130 is Ctrl-C's then
    if set(done.codes) - {0, 128 + stopped, -stopped, -9}:
        wrong.append(f"exit codes {done.codes}")
    if "Traceback" in done.said or errors(done):
        wrong.append(f"said {done.said[-700:]}")
    if 128 + stopped in done.codes and not (re.search(r"stopped by SIG|done: 6 steps", done.said) or stopped == 2):
        wrong.append(f"does not say where it stands: {done.said[-700:]}")
    return wrong + goes_on(theatre, name)


def try_signals(theatre: Theatre, name: str, cases: int) -> None:
    operations = theatre.open(name)[2][0]
    draw = random.Random(name)
    for index in range(cases):
        number = 1 + (index * len(operations)) // cases + draw.randrange(max(1, len(operations) // cases))
        signal_name = draw.choice(STOPS)
        wrong = stop(theatre, name, signal_name, min(number, len(operations)))
        assert not wrong, f"{signal_name} before {number}, {operations[number - 1]}: {'; '.join(wrong)}"


@pytest.mark.parametrize("name", [RUNS[0], RUNS[3]])
def test_a_few_signals(theatre: Theatre, name: str) -> None:
    try_signals(theatre, name, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_signals_in_all_phases(theatre: Theatre, name: str) -> None:
    try_signals(theatre, name, 16)


def told_once(done: Done, words: str) -> list[str]:
    """What is wrong with how the survivors tell it."""
    found = errors(done)
    wrong = [] if len(found) == 1 and re.search(words, found[0]) else [f"errors: {found}"]
    return wrong + ([done.said[-900:]] if "Traceback" in done.said else [])


@pytest.mark.parametrize("name", [RUNS[3], *(pytest.param(name, marks=pytest.mark.slow) for name in RUNS[:3])])
def test_nonsense_on_one_rank_is_found_by_all(theatre: Theatre, name: str) -> None:
    """The forward passes of the last rank give NaN from some module on."""
    scene, rank = SCENES[name], SCENES[name].ranks - 1
    theatre.open(name)
    for number in random.Random(name).sample(range(1, 90), 2):
        theatre.set_up([name])
        done = theatre.stage.run(scene.words, theatre.work, "nan", number, scene.ranks, rank)
        assert set(done.codes) == {2}, done
        wrong = told_once(done, "is not finite .*the first bad tensor is")
        wrong += goes_on(theatre, name)
        assert not wrong, (number, wrong)


@pytest.mark.parametrize(
    "name", [RUNS[2], *(pytest.param(name, marks=pytest.mark.slow) for name in (RUNS[1], RUNS[3]))]
)
def test_a_stopped_rank_is_named_by_the_other(theatre: Theatre, name: str) -> None:
    scene = SCENES[name]
    operations, words = theatre.open(name)[2][1], [*scene.words, "parallel.timeout=5"]
    theatre.set_up([name])
    theatre.play(words, scene.ranks)
    last = snapshot(theatre.work)
    for number in random.Random(name).sample(range(1, len(operations) + 1), 2):
        theatre.set_up([name])
        done = theatre.stage.run(words, theatre.work, "SIGSTOP", number, scene.ranks, 1)
        assert done.codes[1] == -9 and done.codes[0] in (1, 2), done
        wrong = told_once(done, "rank 1|another rank did not write its part")
        wrong += goes_on(theatre, name, last)
        assert not wrong, (number, operations[number - 1], wrong)


@pytest.mark.parametrize("name", ["train", "convert --force", pytest.param("finetune", marks=pytest.mark.slow)])
def test_too_little_memory(theatre: Theatre, name: str) -> None:
    """Done within it, or one line."""
    scene = SCENES[name]
    theatre.open(name)
    refused = 0
    for megabytes in (3, 12, 64):
        theatre.set_up([name])
        done = theatre.stage.run(scene.words, theatre.work, "memory", megabytes, job=scene.job)
        assert done.code in (0, 2), (megabytes, done)
        wrong = told_once(done, "error: out of memory") if done.code else []
        refused += done.code == 2
        assert not wrong + theatre.make_up(name, done.code != 0), (megabytes, done, wrong)
    assert refused


# In a namespace of its own, so that nobody else's /dev/shm is full. Its one page is taken, too.
FULL_SHM = """
mount -t tmpfs -o size=4k none /dev/shm && ! head -c 5000 /dev/zero > /dev/shm/full 2>/dev/null || exit 77
exec "$@"
"""


@pytest.mark.slow
def test_two_ranks_train_where_shared_memory_is_full(theatre: Theatre) -> None:
    name = "train on 2 ranks, dp"
    _, last, _ = theatre.open(name)
    theatre.set_up([name])
    words = [sys.executable, "-m", "castalia", *SCENES[name].words, "--nproc", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    try:
        done = subprocess.run(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", FULL_SHM, "sh", *words],
            cwd=theatre.work, env=environment, capture_output=True, text=True,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("needs unshare of util-linux")
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip(f"needs a kernel that lets users mount in a namespace of their own: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr[-900:]
    assert not differences(last, snapshot(theatre.work))
