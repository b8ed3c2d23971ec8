"""Runs the documentation: every ```sh block of docs/*.md, in order, in one empty folder for each document, and the
recipes of some pages; the types of those of docs/python.md are checked as well.

Blocks of other kinds (```console, ```text, ```yaml) are for reading. Runs are cut to a few steps; nothing else changes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHELL_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RECIPE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTED_BLOCK = re.compile(r"^```sh\n(.*?)^```\n\n```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"(?<![\w.,])[\d,]+\.\d+(?![\w.])")
LENGTH = re.compile(r"\b(train\.steps=|train_iters=)(\d+)")
MOST_STEPS = 12


def blocks(document: Path) -> list[str]:
    """Commands in the order of the page; recipes come last."""
    text = document.read_text(encoding="utf-8")
    recipes = [f"cat > recipe.py <<'PYTHON'\n{recipe}PYTHON\npython recipe.py" for recipe in RECIPE.findall(text)]
    return SHELL_BLOCK.findall(text) + (recipes if document.stem in WITH_RECIPES else [])


def shortened(block: str) -> str:
    return LENGTH.sub(lambda found: f"{found[1]}{min(int(found[2]), MOST_STEPS)}", block)


WITH_RECIPES: dict[str, tuple[str, ...]] = {"python": (), "interpretability": ("nnsight", "transformer_lens")}
DOCUMENTS = sorted(path for path in (ROOT / "docs").glob("*.md") if blocks(path))


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_commands_of_the_documentation_work(document, tmp_path):
    for package in WITH_RECIPES.get(document.stem, ()):
        pytest.importorskip(package, reason=f"needs {package}: pip install castalia[interp]")
    for shipped in ("examples", "configs"):
        (tmp_path / shipped).symlink_to(ROOT / shipped)
    for block in blocks(document):
        printed(shortened(block), tmp_path)


@pytest.mark.slow
def test_the_recipes_in_python_have_the_types_that_they_need(tmp_path):
    recipes = RECIPE.findall((ROOT / "docs" / "python.md").read_text(encoding="utf-8"))
    assert len(recipes) == 10
    for number, recipe in enumerate(recipes, start=1):
        (tmp_path / f"recipe_{number}.py").write_text(f"def recipe_{number}() -> None:\n{indent(recipe, '    ')}")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", str(tmp_path / "cache"), "."]
    # Found as other packages are, by its `py.typed`; mypy does not follow the hook of an editable install.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    checked = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert checked.returncode == 0, checked.stdout


def printed(script: str, folder: Path) -> str:
    """What a block prints, which must end without an error."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "120"}
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert result.returncode == 0, f"{script}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_the_figures_of_scaling_are_those_that_its_commands_print(tmp_path):
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    found = PRINTED_BLOCK.findall(page)
    assert len(found) == len(blocks(ROOT / "docs" / "scaling.md")) == 4
    for script, shown in found:
        assert printed(script, tmp_path) == shown
    layouts = page[: page.index("## How far off")]  # the figures there are of other commands
    prose, output = PRINTED_BLOCK.sub("", layouts), "".join(shown for _, shown in found)
    derived = {f"{1024 / 96:.1f}", f"{36 / 6.18:.1f}", f"{229.72 / 96:.2f}", f"{229.72 / 1024:.2f}"}
    derived.add(f"{0.82 + 1.64:.2f}")  # masters and moments
    assert set(FIGURE.findall(prose)) - derived <= set(FIGURE.findall(output))
    assert derived <= set(FIGURE.findall(prose))


def test_the_figures_of_larger_than_memory_are_those_that_its_commands_print(tmp_path):
    ((script, shown),) = PRINTED_BLOCK.findall((ROOT / "docs" / "larger-than-memory.md").read_text(encoding="utf-8"))
    assert printed(script, tmp_path) == shown


def test_links_between_documents_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert not broken
