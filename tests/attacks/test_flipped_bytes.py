"""One damaged byte of our own files, which only one of two ranks reads, ends every command in every layout."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from castalia.checkpoint.opener import open_checkpoint
from castalia.data.dataset_writer import DatasetWriter
from castalia.storage.extent import FileTensor

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.vocab_multiple=2", "data.split=90,10,0",
    "data.seq_length=16", "tokenizer.kind=bytes", "precision.compute=fp32", "train.steps=2", "train.batch_size=4",
    "eval.batches=1",
)  # fmt: skip


def castalia(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "castalia", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flipped")
    with DatasetWriter(folder / "words", "uint16") as writer:
        draw = random.Random(0)
        for _ in range(40):
            writer.add([*draw.randbytes(20), 256])
    done = castalia("train", *SETTINGS, f"data.path={folder}/words", f"checkpoint.dir={folder}/run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def damaged(run: Path, folder: Path, name: str) -> Path:
    """A copy of the run, in which one byte of a tensor's second half is another."""
    shutil.copytree(run, folder)
    checkpoint = open_checkpoint(folder)
    weight, _, kind = name.partition(":")
    ref = checkpoint.optimizer[weight][kind] if kind else checkpoint.model[weight]  # type: ignore[index, literal-required]
    assert isinstance(ref, FileTensor)
    content = bytearray(ref.extent.path.read_bytes())
    content[ref.extent.offset + ref.extent.size - 5] ^= 1
    ref.extent.path.write_bytes(content)
    return folder


UP = "blocks.1.mlp.up.weight"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["train", "parallel.tp=2"], UP),
        (["train", "parallel.pp=2"], UP),
        (["train", "parallel.cp=2"], UP),
        (["train", "parallel.zero=1"], f"{UP}:exp_avg"),
        (["train", "parallel.zero=3"], UP),
        (["eval", "--tp", "2"], UP),
    ],
    ids=str,
)
def test_layouts(words: list[str], name: str, run: Path, tmp_path: Path) -> None:
    verb, *options = words
    path = damaged(run, tmp_path / "run", name)
    if verb == "train":
        options += ["train.steps=3", "checkpoint.schedule_from=checkpoint", "--nproc", "2"]
    done = castalia(verb, path, *options)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{UP}" in done.stderr and "is damaged: bytes" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [["inspect", "{}", "--tensors"], ["convert", "{}", "{}-out", "--to", "hf"], ["diff", "{}", "{}"]],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("name", [UP, f"{UP}:exp_avg_sq"])
def test_commands(words: list[str], name: str, run: Path, tmp_path: Path) -> None:
    path = damaged(run, tmp_path / "run", name)
    done = castalia(*(word.format(path) for word in words))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "is damaged: bytes" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run-out").exists()


def test_a_manifest_that_says_something_else_is_refused_before_anything_is_read(run: Path, tmp_path: Path) -> None:
    from castalia.errors import CheckpointError
    from castalia.storage.checksum import crc32

    step = shutil.copytree(run / "checkpoints" / "step_000002", tmp_path / "step")
    whole = json.loads((step / "manifest.json").read_text())
    other = next(name for name in whole["model"] if name != UP)
    file = next(iter(whole["files"]))
    changes = [
        ("offset", whole["files"][file]["bytes"], "is to end at byte"),
        ("offset", 4, "is to lie in bytes of the header"),
        ("offset", whole["model"][other]["extents"][0]["offset"], "is to lie in bytes of"),
        ("file", "elsewhere", "is not one of its files"),
        ("file", "../manifest.json", "is not one of its files"),
        ("crc32", [], "has 0 checksums for"),
        ("crc32", [None], "where a whole number is expected"),
        ("start", [0, 1], "do not make up a tensor"),
        ("shape", [1, 32], "has 1 checksums for|do not make up"),
        ("offset", -4, "where a whole number is expected"),
    ]
    for key, value, message in changes:
        manifest = json.loads(json.dumps(whole))
        del manifest["crc32"]
        manifest["model"][UP]["extents"][0][key] = value
        manifest["crc32"] = crc32(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())
        (step / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(step)
