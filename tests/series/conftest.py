"""Tiny runs whose steps are all saved, which tests copy and change."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from castalia.config.load import load_config
from castalia.data.dataset_writer import DatasetWriter
from castalia.train.loop import train

WORDS = ["the", "light", "was", "good", "and", "there", "evening", "morning", "day", "waters"]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Prefix of 60 documents of words."""
    prefix = tmp_path_factory.mktemp("corpus") / "words"
    draw = random.Random(1)
    with DatasetWriter(prefix, "uint16") as writer:
        for _ in range(60):
            writer.add([*" ".join(draw.choices(WORDS, k=draw.randint(20, 60))).encode(), 256])
    return prefix


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """A function: overrides -> the folder of a run that was trained with them, once for each choice."""
    known: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str) -> Path:
        if overrides not in known:
            folder = tmp_path_factory.mktemp("runs") / "run"
            train(load_config([], [*settings(corpus), f"checkpoint.dir={folder}", *overrides]))
            known[overrides] = folder
        return known[overrides]

    return run


def settings(corpus: Path) -> list[str]:
    return [
        "model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.vocab_multiple=1",
        f"data.path={corpus}", "data.split=90,10,0", "data.seq_length=16", "tokenizer.kind=bytes",
        "precision.compute=fp32", "optimizer.lr=0.003", "schedule.warmup_steps=4", "train.steps=20",
        "train.batch_size=8", "train.micro_batch_size=8", "eval.every=null", "log.peak_tflops=0.1",
        "checkpoint.every=1", "checkpoint.steps=[0]", "checkpoint.keep_best=false",
    ]  # fmt: skip


@pytest.fixture
def copy(tmp_path):
    """A function: run -> a copy of its folder that may be changed."""

    def copied(run: Path) -> Path:
        return Path(shutil.copytree(run, tmp_path / "copy" / run.name))

    return copied
