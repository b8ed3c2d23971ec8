"""How fast this machine trains."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from castalia.config.load import load_config
from castalia.config.schema import RunConfig
from castalia.data.dataset_writer import DatasetWriter
from castalia.plan.flops import training_flops
from castalia.quickstart.choose import Pace
from castalia.quickstart.family import architecture
from castalia.train.setup import Session, start

TRIALS = {"cpu": ((2, 64), (4, 192)), "cuda": ((6, 384), (12, 768)), "mps": ((2, 128), (6, 384))}  # layers, width
TRIAL_SECONDS = 4.0
MOST_SECONDS = 12.0  # even where it has not made its steps
LEAST_STEPS, WARMUP_STEPS = 3, 1


def measure_pace(device: str) -> Pace:
    """From a few steps of two models on random tokens: what each token costs, and what each operation."""
    vocab_size, length = 2048, 256
    batch = 8 if device == "cpu" else 64
    points = []
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name) / "random"
        with DatasetWriter(corpus, np.uint16) as writer:
            tokens = np.random.default_rng(0).integers(1, vocab_size, (256, length), dtype=np.uint16)
            writer.add_many(tokens.reshape(-1), [length] * len(tokens))
        for layers, width in TRIALS[device]:
            values: Mapping[str, Any] = {
                "model": architecture(layers, width, vocab_size, length),
                "data": {"train": str(corpus), "seq_length": length},
                # Of the steps, time ends the trial long before the last one.
                "train": {"steps": 10_000, "batch_size": batch, "device": device},
            }
            config = load_config([dict(values)])
            assert config.model is not None
            seconds = seconds_per_step(config, TRIAL_SECONDS) / (batch * length)
            points.append((training_flops(config.model, length), seconds))
    return fitted(points)


def fitted(points: Sequence[tuple[float, float]]) -> Pace:
    """The line through two pairs of operations and seconds of a token; where it would not rise, through the origin and
    the larger model."""
    (less, fast), (more, slow) = points
    rate = (slow - fast) / (more - less)
    alone = fast - less * rate
    return Pace(alone, 1 / rate) if rate > 0 and alone > 0 else Pace(0.0, more / slow)


def seconds_per_step(config: RunConfig, seconds: float) -> float:
    """The median step of the run that the config describes, which is tried for so long. Writes nothing that stays."""
    with tempfile.TemporaryDirectory() as folder:  # for the index of samples: that of the run is another one
        return _median_step(start(config.with_({"data.cache_dir": folder})), seconds)


def _median_step(session: Session, seconds: float) -> float:
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < WARMUP_STEPS + LEAST_STEPS or time.perf_counter() - begin < seconds:
        number = len(times)
        before = time.perf_counter()
        session.step(number, session.batch(number))
        times.append(time.perf_counter() - before)
        if len(times) > WARMUP_STEPS and time.perf_counter() - begin > MOST_SECONDS:
            break
    return statistics.median(times[WARMUP_STEPS:])
