"""Log-probabilities of a corpus by a streamed model are those of the model in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from castalia.checkpoint.file_plan import TargetLayout
from castalia.data.dataset_writer import DatasetWriter
from castalia.train.evaluation import write_log_probs
from tests.checkpoint.made import FAMILIES, made, written


def test_a_streamed_model_gives_the_same_bits(tmp_path: Path) -> None:
    model = written(made(FAMILIES["gpt_neox"], optimizer=False), tmp_path / "model", "neox", layout=TargetLayout(tp=2))
    random = np.random.default_rng(0)
    with DatasetWriter(tmp_path / "corpus", "uint16") as writer:
        for length in (5, 30, 1, 17, 64, 3, 2, 9, 11, 40):
            writer.add(random.integers(0, 90, length))
    for name, memory in (("whole", None), ("streamed", 1_000_000_000)):
        assert write_log_probs(model, str(tmp_path / "corpus"), str(tmp_path / name), memory) == 10
    assert (tmp_path / "whole.bin").read_bytes() == (tmp_path / "streamed.bin").read_bytes()
