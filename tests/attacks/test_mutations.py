"""Files that were changed at random end in one clear error, or change nothing: see `tests.attacks.mutations`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHEAP = (
    "native manifest", "native manifest, signed", "native files", "older native files", "torch.save", "safetensors",
    "index json", "castalia.json", ".bin", "corpus", "index caches", "metrics.jsonl", "latest",
)  # fmt: skip


def attack(cases: int, seed: int, tmp_path: Path, *options: str) -> None:
    """In a process of its own, which forks for each case: it must not have other threads."""
    command = [sys.executable, "-m", "tests.attacks.mutations", "--cases", str(cases), "--seed", str(seed), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_few_changes_of_the_commonest_files(tmp_path: Path) -> None:
    attack(39, 1, tmp_path, "--kinds", ";".join(CHEAP))


@pytest.mark.slow
def test_changes_of_every_kind_of_file(tmp_path: Path) -> None:
    attack(132, 2, tmp_path)


@pytest.mark.campaign
def test_a_thousand_changes(tmp_path: Path) -> None:
    attack(1000, 0, tmp_path)
