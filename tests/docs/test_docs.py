"""Runs the documentation: every ```sh block of docs/*.md, in order, in one empty folder for each document.

Blocks of other kinds (```console, ```text, ```yaml) are for reading. Runs are cut to a few steps; nothing else changes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHELL_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LENGTH = re.compile(r"\b(train\.steps=|train_iters=)(\d+)")
MOST_STEPS = 12


def blocks(document: Path) -> list[str]:
    return SHELL_BLOCK.findall(document.read_text(encoding="utf-8"))


def shortened(block: str) -> str:
    return LENGTH.sub(lambda found: f"{found[1]}{min(int(found[2]), MOST_STEPS)}", block)


DOCUMENTS = sorted(path for path in (ROOT / "docs").glob("*.md") if blocks(path))


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_commands_of_the_documentation_work(document, tmp_path):
    for shipped in ("examples", "configs"):
        (tmp_path / shipped).symlink_to(ROOT / shipped)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "120"}
    for block in blocks(document):
        script = shortened(block)
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert result.returncode == 0, f"{document.name}:\n{script}\n{result.stdout}\n{result.stderr}"


def test_links_between_documents_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert not broken
