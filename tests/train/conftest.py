"""A corpus of bytes, a model of a few thousand parameters, and one run of 20 steps that many tests look at."""

from __future__ import annotations

import random

import pytest
import torch

from castalia.config.load import load_config
from castalia.data.dataset_writer import DatasetWriter
from castalia.train.loop import train

MODEL = ["model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.vocab_multiple=1"]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Prefix of 60 documents of words."""
    prefix = tmp_path_factory.mktemp("corpus") / "words"
    words = ["the", "light", "was", "good", "and", "there", "evening", "morning", "day", "waters"]
    draw = random.Random(1)
    with DatasetWriter(prefix, "uint16") as writer:
        for _ in range(60):
            writer.add([*" ".join(draw.choices(words, k=draw.randint(20, 60))).encode(), 256])
    return prefix


@pytest.fixture(scope="session")
def tiny(corpus):
    """A function: folder of the run and overrides -> config of a tiny run."""

    def config(folder, *overrides):
        return load_config(
            [],
            [
                *MODEL,
                f"data.path={corpus}",
                "data.split=90,10,0",
                "data.seq_length=16",
                "tokenizer.kind=bytes",
                "precision.compute=fp32",
                "optimizer.lr=0.01",
                "train.steps=20",
                "train.batch_size=8",
                "train.micro_batch_size=4",
                "eval.every=5",
                "eval.batches=1",
                "log.peak_tflops=0.1",
                "checkpoint.every=10",
                f"checkpoint.dir={folder}",
                *overrides,
            ],
        )

    return config


@pytest.fixture(scope="session")
def straight(tiny, tmp_path_factory):
    """The folder of a run that was never stopped: dropout, bf16 and 20 steps."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    return train(tiny(folder, "model.hidden_dropout=0.1", "precision.compute=bf16"))
