"""A model of the 20B's shape, narrow and deep, is evaluated and writes under a limit that it does not fit into."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from castalia.data.dataset_writer import DatasetWriter
from castalia.plan.stream_plan import PROGRAM_BYTES
from tests.checkpoint.synthetic import shape_of_20b, write_20b

MODEL = shape_of_20b(704, num_heads=8)  # 333M parameters: 666 MB in fp16, 1.3 GB in fp32
LIMIT = PROGRAM_BYTES + 300_000_000
STACKS = 100_000_000  # address space that the C library reserves for stacks and heaps of threads that have ended
WORDS = ["data.seq_length=32", "precision.compute=fp32", "--json"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts all private memory on Linux only"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Files of TP 2 x PP 4 and the same as shards of Hugging Face, a corpus, and prompts as ids."""
    place = tmp_path_factory.mktemp("large")
    write_20b(place / "neox", MODEL, optimizer=False)
    run(["convert", place / "neox", place / "hf", "--to", "hf"])
    with DatasetWriter(place / "corpus", "uint16") as writer:
        writer.add(np.random.default_rng(0).integers(0, 50000, 140))
    return place


def run(words: list, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process that may have so many bytes of private memory."""
    set_limit = partial(resource.setrlimit, resource.RLIMIT_DATA, (limit, limit)) if limit else None
    line = [sys.executable, "-m", "castalia", *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, preexec_fn=set_limit)
    assert done.returncode == 0, done.stderr
    return done


def test_it_does_not_fit(place: Path) -> None:
    code = f"import castalia; castalia.load_model({str(place / 'hf')!r})"
    limit = partial(resource.setrlimit, resource.RLIMIT_DATA, (LIMIT, LIMIT))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode and "alloc" in done.stderr


def test_losses_are_those_of_the_whole_model(place: Path) -> None:
    whole = json.loads(run(["eval", place / "hf", "--data", place / "corpus", *WORDS]).stdout)
    for folder in ("neox", "hf"):
        words = ["eval", place / folder, "--data", place / "corpus", "--memory", LIMIT, *WORDS]
        done = run(words, LIMIT)
        assert json.loads(done.stdout)["loss"] == whole["loss"]
        assert "each pass reads" in " ".join(done.stderr.split())


def test_a_limit_is_noticed(place: Path) -> None:
    """Without --memory, too: the model is larger than what this process may have."""
    done = run(["eval", place / "hf", "--data", place / "corpus", *WORDS], int(1.3 * LIMIT))
    assert "each pass reads" in " ".join(done.stderr.split())


def test_a_verdict_within_the_limit(place: Path) -> None:
    words = ["convert", place / "neox", place / "native", "--to", "native", "--verify", "--memory", LIMIT]
    done = run(words, LIMIT + STACKS)
    assert "532 of 532 tensors equal" in " ".join(done.stdout.split())
