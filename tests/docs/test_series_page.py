"""What the page on series shows is what its commands print."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.test_docs import ROOT, SHELL_BLOCK, blocks

PAGE = ROOT / "docs" / "series.md"


@pytest.mark.slow
def test_the_audit_and_the_study_come_out_as_shown(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "120"}
    printed = []
    for block in blocks(PAGE):
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        printed.append(result.stdout)
    shown = re.findall(r"^```text\n(.*?)^```$", SHELL_BLOCK.sub("", PAGE.read_text(encoding="utf-8")), re.M | re.S)
    assert shown[0] == printed[1]
    assert shown[1] in printed[2]
    heading, columns = shown[2].splitlines()[:2]
    study = next(text for text in printed if "extractable" in text).splitlines()
    assert study[:2] == [heading, columns]  # the figures are those of the machine
    found = json.loads((tmp_path / "found.json").read_text())
    wrong = {step["step"]: step["verdict"] for step in found["steps"] if step["verdict"] != "fine"}
    assert wrong == {4: "duplicate of step 12", 8: "missing"}
    with open(tmp_path / "memorised.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 * 96
    assert all(f"`{name}`" in PAGE.read_text(encoding="utf-8") for name in rows[0] if name != "row")
