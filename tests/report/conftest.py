"""A run of a few steps on two sources, of which validation has a part of each."""

from __future__ import annotations

import random

import pytest
import torch

from castalia.cli.train import train
from castalia.config.load import load_config
from castalia.data.dataset_writer import DatasetWriter

WORDS = ["the", "light", "was", "good", "and", "there", "evening", "morning", "day", "waters"]
MODEL = ["model.num_layers=1", "model.hidden_size=16", "model.num_heads=2", "model.vocab_multiple=1"]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def write_corpus(prefix, texts):
    with DatasetWriter(prefix, "uint16") as writer:
        for text in texts:
            writer.add([*text.encode(), 256])
    return str(prefix)


@pytest.fixture(scope="session")
def corpora(tmp_path_factory):
    """Prefixes of the training text and of two held-out ones."""
    folder, draw = tmp_path_factory.mktemp("corpora"), random.Random(1)
    texts = [" ".join(draw.choices(WORDS, k=50)) for _ in range(30)]
    return [
        write_corpus(folder / name, texts[at:end]) for name, at, end in (("words", 0, 20), ("a", 20, 25), ("b", 25, 30))
    ]


@pytest.fixture(scope="session")
def run(corpora, tmp_path_factory):
    """Its folder."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    data = [f"data.train={corpora[0]}", f"data.valid=[{corpora[1]},{corpora[2]}]", "data.seq_length=32"]
    rest = ["tokenizer.kind=bytes", "train.steps=12", "train.batch_size=4", "optimizer.lr=0.01", "eval.every=6"]
    train(load_config([], [*MODEL, *data, *rest, "precision.compute=fp32", f"checkpoint.dir={folder}"]))
    return folder
