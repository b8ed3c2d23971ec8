"""Two runs of twelve steps on bytes, for the page to show."""

from __future__ import annotations

from pathlib import Path

from castalia.cli.train import train
from castalia.config.load import load_config
from castalia.data.dataset_writer import DatasetWriter
from castalia.observe.metrics import write_event

TEXTS = ["a small text, twice over. " * 4, "naïve café, in two bytes each. " * 3, "and the third one. " * 5]


def make_runs(place: Path) -> Path:
    """The folder of the runs `one` and `two`, saved at every fourth step; `one` has a spike in step 7."""
    with DatasetWriter(place / "texts", "uint16") as writer:
        for number in range(20):
            writer.add([*TEXTS[number % 3].encode(), 256])
    model = ["model.num_layers=2", "model.hidden_size=16", "model.num_heads=2", "tokenizer.kind=bytes"]
    data = [f"data.path={place / 'texts'}", "data.split=50,50,0", "data.holdout=contiguous", "data.seq_length=64"]
    rest = ["train.steps=12", "train.batch_size=4", "precision.compute=fp32", "checkpoint.every=4", "eval.every=6"]
    for name, rate in (("one", 0.01), ("two", 0.003)):
        words = [f"checkpoint.dir={place / 'runs' / name}", f"optimizer.lr={rate}"]
        train(load_config([], [*model, *data, *rest, *words]))
    write_event(place / "runs" / "one", "spike", step=7, loss=9.0, grad_norm=3.0, action="report")
    return place / "runs"
