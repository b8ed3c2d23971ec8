"""The README promises what exists."""

from __future__ import annotations

import re
from pathlib import Path

from castalia.cli.main import VERBS

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_table_of_verbs_is_complete():
    rows = re.findall(r"^\| `castalia ([\w-]+)", README, re.MULTILINE)
    assert sorted(set(rows)) == sorted(VERBS)


def test_make_targets_exist():
    makefile = (Path(__file__).resolve().parents[2] / "Makefile").read_text(encoding="utf-8")
    promised = set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
    assert promised >= {"demo", "test", "setup"}
    assert promised <= set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
