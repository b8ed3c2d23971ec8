"""A config that is wrong gets one line for each problem, exit code 2, no traceback, and that at once."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from castalia.config.load import load_config
from castalia.errors import ConfigError
from tests.attacks.bad_configs import bad_config

NUMBER = 500


def judged(number: int, folder: Path) -> str:
    """What is said of a bad config; an assertion where it is not one line for each problem."""
    kind, text = bad_config(number)
    path = folder / f"{number}.yml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError) as caught:
        load_config([path])
    lines = str(caught.value).splitlines()
    assert lines and len(set(lines)) == len(lines), (kind, lines)
    assert all(line.startswith(str(path)) and len(line) < 2000 for line in lines), (kind, lines)
    return str(caught.value)


@pytest.mark.parametrize("start", range(0, 100, 10))
def test_bad_configs_are_refused(start: int, tmp_path: Path) -> None:
    for number in range(start, start + 10):
        judged(number, tmp_path)


@pytest.mark.slow
def test_more_bad_configs_are_refused(tmp_path: Path) -> None:
    for number in range(100, NUMBER):
        judged(number, tmp_path)


@pytest.mark.campaign
def test_bad_configs_on_the_command_line(tmp_path: Path) -> None:
    """Each in a process of its own, as a user meets it; the seconds of the slowest one on a CPU are printed."""
    slowest = 0.0
    for number in range(NUMBER):
        told = judged(number, tmp_path)
        before = seconds_of_processes()
        words = [sys.executable, "-m", "castalia", "config", "check", f"{number}.yml"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        slowest = max(slowest, seconds_of_processes() - before)
        assert (done.returncode, done.stdout) == (2, ""), (number, done)
        expected = "error: " + told.replace(f"{tmp_path}/", "")
        assert done.stderr.splitlines() == expected.splitlines(), (number, done.stderr)
    print(f"{NUMBER} bad configs: exit code 2 and a line for each problem; the slowest took {slowest:.2f} s")


def seconds_of_processes() -> float:
    """Of the processes that have ended, on CPUs: what others do on this machine is no part of it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
