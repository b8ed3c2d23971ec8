"""The README promises what exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from castalia.cli.main import VERBS
from tests.docs.readme_demo import BLOCK, shortened

ROOT = Path(__file__).resolve().parents[2]

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_table_of_verbs_is_complete():
    rows = re.findall(r"^\| `castalia ([\w-]+)", README, re.MULTILINE)
    assert sorted(set(rows)) == sorted(VERBS)


def test_make_targets_exist():
    makefile = (Path(__file__).resolve().parents[2] / "Makefile").read_text(encoding="utf-8")
    promised = set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
    assert promised >= {"demo", "test", "setup"}
    assert promised <= set(re.findall(r"^(\w+):", makefile, re.MULTILINE))


def form(line: str) -> str:
    """Without figures, which differ with the number of steps and from machine to machine."""
    return re.sub(r"\d[\d.,]*", "#", line)


@pytest.mark.slow
def test_the_demo_prints_what_is_shown(tmp_path):
    """A demo of four steps prints the same lines up to figures, and text after the same prompt."""
    for shipped in ("examples", "configs"):
        (tmp_path / shipped).symlink_to(ROOT / shipped)
    recipe = subprocess.run(
        ["make", "-n", "demo", "DEMO_STEPS=4"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    commands = [line for line in recipe.stdout.splitlines() if line.startswith(".venv/bin/castalia ")]
    environment, printed = {**os.environ, "PYTHONPATH": str(ROOT)}, []
    for command in commands:
        program = command.replace(".venv/bin/castalia", f"{sys.executable} -m castalia", 1)
        result = subprocess.run(
            ["sh", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, f"{command}\n{result.stderr}"
        printed += [command, *result.stdout.splitlines()]
    shown, got = BLOCK.findall(README)[0].splitlines(), list(shortened(printed))
    text = next(index for index, line in enumerate(shown) if "castalia generate" in line) + 1
    assert list(map(form, shown[:text])) == list(map(form, got[:text]))
    prompt = "And the LORD said unto"
    assert shown[text].startswith(prompt) and got[text].startswith(prompt)
