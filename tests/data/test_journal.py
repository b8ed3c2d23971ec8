import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from castalia.config.schema import Tokenizer
from castalia.data.indexed import Writer, open_dataset
from castalia.data.prepare import Recipe, Report, prepare
from castalia.errors import DataError

# Prepares and is killed without warning once the third of its chunks is written and noted.
KILLED = """
import os, signal, sys
from castalia.config.schema import Tokenizer
from castalia.data import journal
from castalia.data.prepare import Recipe, prepare

journal.SECONDS_BETWEEN_NOTES = 0.0
calls = []

def progress(report):
    calls.append(report.documents)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)

recipe = Recipe(Tokenizer(kind="bytes"), append_eod=True, mask_before=(58,))
prepare([sys.argv[1]], sys.argv[2], recipe, workers=1, on_progress=progress)
"""
RECIPE = Recipe(Tokenizer(kind="bytes"), append_eod=True, mask_before=(58,))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i}: " + "word " * 40}) + "\n" for i in range(6000)))
    return path


def kill_half_way(source: Path, output: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, source, output], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL and not Path(f"{output}_text_document.bin").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_killed_and_continued_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    prepare([source], tmp_path / "whole" / "x", RECIPE)
    kill_half_way(source, tmp_path / "parts" / "x")
    with (tmp_path / "parts" / "x_text_document.bin.partial").open("ab") as file:
        file.write(b"written after the last note")
    seen: list[Report] = []
    report = prepare([source], tmp_path / "parts" / "x", RECIPE, on_progress=seen.append)
    assert 0 < report.continued["documents"] < 6000 and seen[0].documents > report.continued["documents"]
    assert (report.documents, report.done_bytes) == (6000, source.stat().st_size)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("change", ["input", "recipe", "partial file", "journal"])
def test_what_has_changed_starts_over(source: Path, tmp_path: Path, change: str) -> None:
    out, recipe = tmp_path / "parts" / "x", RECIPE
    kill_half_way(source, out)
    if change == "input":
        source.write_text(source.read_text().replace("word", "Word"))
    elif change == "recipe":
        recipe = Recipe(RECIPE.tokenizer, mask_before=(58,))
    elif change == "journal":
        Path(f"{out}.journal").write_text("{")
    else:
        os.truncate(f"{out}_label_document.bin.partial", 100)
    report = prepare([source], out, recipe)
    assert report.continued == {}
    prepare([source], tmp_path / "whole" / "x", recipe)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_an_interrupt_from_the_keyboard_keeps_what_is_done(source: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("castalia.data.journal.SECONDS_BETWEEN_NOTES", 0.0)

    def interrupt(report: Report) -> None:
        if report.documents > 3000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([source], tmp_path / "parts" / "x", RECIPE, workers=1, on_progress=interrupt)
    report = prepare([source], tmp_path / "parts" / "x", RECIPE)
    assert report.continued["documents"] > 0
    prepare([source], tmp_path / "whole" / "x", RECIPE)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_leftovers_are_overwritten_and_writers_exclude_each_other(tmp_path: Path) -> None:
    (tmp_path / "x.bin.partial").write_bytes(b"left by a killed process")
    with Writer(tmp_path / "x", "u2") as writer:
        writer.add([1, 2])
        with pytest.raises(DataError, match="another process is writing"):
            Writer(tmp_path / "x", "u2")
    assert open_dataset(tmp_path / "x")[0].tolist() == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]
