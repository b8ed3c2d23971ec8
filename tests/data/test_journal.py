import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from castalia.config.schema import TokenizerConfig
from castalia.data.dataset_writer import DatasetWriter
from castalia.data.indexed import open_dataset
from castalia.data.prepare import PreparationReport, Recipe, prepare
from castalia.errors import DataError

# Prepares and is killed without warning once the third of its chunks is written and noted.
KILLED = """
import os, signal, sys
from castalia.config.schema import TokenizerConfig
from castalia.data import journal
from castalia.data.prepare import Recipe, prepare

journal.SECONDS_BETWEEN_NOTES = 0.0
calls = []

def progress(report):
    calls.append(report.documents)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)

recipe = Recipe(TokenizerConfig(kind="bytes"), append_eod=True, mask_before=(58,))
prepare([sys.argv[1]], sys.argv[2], recipe, workers=1, on_progress=progress)
"""
RECIPE = Recipe(TokenizerConfig(kind="bytes"), append_eod=True, mask_before=(58,))


def write_source(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": f"{i}: " + "word " * 40}) + "\n" for i in range(6000)))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "a.jsonl")


class HalfDone(NamedTuple):
    source: Path
    folder: Path  # where the killed process left its files, all beginning with x


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> HalfDone:
    folder = tmp_path_factory.mktemp("killed")
    source = write_source(folder / "a.jsonl")
    words = [sys.executable, "-c", KILLED, source, folder / "parts" / "x"]
    done = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL and not (folder / "parts" / "x_text_document.bin").exists()
    return HalfDone(source, folder / "parts")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_killed_and_continued_gives_the_same_bytes(killed: HalfDone, tmp_path: Path) -> None:
    source, parts = killed.source, shutil.copytree(killed.folder, tmp_path / "parts")
    prepare([source], tmp_path / "whole" / "x", RECIPE, workers=1)
    with (parts / ".x_text_document.bin.castalia-partial").open("ab") as file:
        file.write(b"written after the last note")
    seen: list[PreparationReport] = []
    report = prepare([source], parts / "x", RECIPE, workers=1, on_progress=seen.append)
    assert 0 < report.continued["documents"] < 6000 and seen[0].documents > report.continued["documents"]
    assert (report.documents, report.done_bytes) == (6000, source.stat().st_size)
    assert contents(parts) == contents(tmp_path / "whole")


def test_workers_end_with_a_killed_parent(source: Path, tmp_path: Path) -> None:
    """The worker's process holds the pipe's other end open for as long as it lives."""
    script = (
        "import os, signal, sys\n"
        "from castalia.config.schema import TokenizerConfig\n"
        "from castalia.data.prepare import Recipe, prepare\n"
        "if __name__ == '__main__':\n"
        "    kill = lambda report: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    prepare([sys.argv[1]], sys.argv[2], Recipe(TokenizerConfig(kind='bytes')), workers=2, on_progress=kill)\n"
    )
    (tmp_path / "killed.py").write_text(script)
    source.write_text(source.read_text() * 3)  # enough for two workers
    words = [sys.executable, tmp_path / "killed.py", source, tmp_path / "x"]
    done = subprocess.run(words, stdout=subprocess.PIPE, timeout=30, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("change", ["input", "recipe", "partial file", "journal"])
def test_what_has_changed_starts_over(killed: HalfDone, tmp_path: Path, change: str) -> None:
    source, parts, recipe = killed.source, shutil.copytree(killed.folder, tmp_path / "parts"), RECIPE
    before = source.stat()
    if change == "input":
        os.utime(source)
    elif change == "recipe":
        recipe = Recipe(RECIPE.tokenizer, mask_before=(58,))
    elif change == "journal":
        (parts / ".x.castalia-journal").write_text("{")
    else:
        os.truncate(parts / ".x_label_document.bin.castalia-partial", 100)
    report = prepare([source], parts / "x", recipe, workers=1)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))  # as the other tests know it
    assert report.continued == {}
    prepare([source], tmp_path / "whole" / "x", recipe, workers=1)
    assert contents(parts) == contents(tmp_path / "whole")


def test_an_interrupt_from_the_keyboard_keeps_what_is_done(source: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("castalia.data.journal.SECONDS_BETWEEN_NOTES", 0.0)

    def interrupt(report: PreparationReport) -> None:
        if report.documents > 3000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([source], tmp_path / "parts" / "x", RECIPE, workers=1, on_progress=interrupt)
    report = prepare([source], tmp_path / "parts" / "x", RECIPE, workers=1)
    assert report.continued["documents"] > 0
    prepare([source], tmp_path / "whole" / "x", RECIPE, workers=1)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_leftovers_are_overwritten_and_writers_exclude_each_other(tmp_path: Path) -> None:
    (tmp_path / ".x.bin.castalia-partial").write_bytes(b"left by a killed process")
    with DatasetWriter(tmp_path / "x", "u2") as writer:
        writer.add([1, 2])
        with pytest.raises(DataError, match="another process is writing"):
            DatasetWriter(tmp_path / "x", "u2")
    assert open_dataset(tmp_path / "x")[0].tolist() == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]
