import pytest

from castalia.cli.train import train
from castalia.config.load import load_config
from castalia.data.dataset_writer import DatasetWriter

TEXTS = ["a small text, twice over. " * 4, "naïve café, in two bytes each. " * 3, "and the third one. " * 5]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Prefix of 20 documents; the last ten are for validation, each in bytes with an end of its own."""
    prefix = tmp_path_factory.mktemp("corpus") / "texts"
    with DatasetWriter(prefix, "uint16") as writer:
        for number in range(20):
            writer.add([*TEXTS[number % 3].encode(), 256])
    return prefix


@pytest.fixture(scope="session")
def run(corpus, tmp_path_factory):
    """A run of 12 steps on it."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    model = ["model.num_layers=1", "model.hidden_size=16", "model.num_heads=2", "model.vocab_multiple=1"]
    data = [
        f"data.path={corpus}",
        "data.split=50,50,0",
        "data.holdout=contiguous",
        "data.seq_length=16",
        "tokenizer.kind=bytes",
    ]
    rest = ["train.steps=12", "train.batch_size=4", "optimizer.lr=0.01", "precision.compute=fp32", "eval.every=6"]
    return train(load_config([], [*model, *data, *rest, f"checkpoint.dir={folder}"]))
