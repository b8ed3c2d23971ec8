"""The package as others install it: a wheel without the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

from castalia import __version__

ROOT = Path(__file__).parents[1]


def test_files_beside_the_code_are_packaged() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["castalia"]
    files = [path.relative_to(ROOT / "castalia") for path in (ROOT / "castalia").rglob("*") if path.is_file()]
    data = [str(path) for path in files if path.suffix != ".py" and "__pycache__" not in path.parts]
    assert "config/presets/pythia-14m.yml" in data and "py.typed" in data
    assert [path for path in data if not any(fnmatch(path, pattern) for pattern in patterns)] == []


def test_one_version() -> None:
    assert re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [__version__]
    newest = re.search(r"^## (\S+?)(,|$)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == __version__


@pytest.mark.slow
def test_a_wheel_needs_nothing_of_the_repository(tmp_path: Path) -> None:
    """Built from a copy, unpacked, and used in an empty folder; the libraries are those of this environment."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "castalia", source / "castalia", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("castalia-*.whl")
    assert wheel.name.startswith(f"castalia-{__version__}-py3")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "site")
    place = tmp_path / "elsewhere"
    (place / "my_texts").mkdir(parents=True)
    for number in range(40):
        text = " ".join(f"In the year {number * year} nothing of note happened." for year in range(200))
        (place / "my_texts" / f"{number}.txt").write_text(text)

    def castalia(*words: str) -> str:
        code = "import castalia, sys; from castalia.cli.main import main; sys.stderr.write(castalia.__file__); main()"
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            cwd=place,
            env=environment,
            text=True,
            capture_output=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith(str(tmp_path / "site"))
        return done.stdout

    assert castalia("--version").startswith(f"castalia {__version__}\n")
    assert "num_layers" in castalia("config", "show", "pythia-14m")
    assert "exec torchrun" in castalia("launch", "torchrun", "pythia-14m", "--gpus-per-node", "2")
    assert "without --dry-run the run begins" in castalia("start", "my_texts", "--hours", "0.01", "--dry-run")
