"""What the start of a run and a plan know about corpora."""

import numpy as np
import pytest

from castalia.config.schema import DataConfig
from castalia.data.sample_index import build_overflowing
from castalia.train.run_facts import samples_of_whole_documents


def test_samples_of_one_pass_over_whole_documents():
    sizes = np.random.default_rng(1).integers(1, 30, 400)
    data = DataConfig(seq_length=24, packing="pack_until_overflow")
    everything = np.arange(400)
    index = build_overflowing(sizes, everything, np.ones(400, bool), 2000, 24, 1)
    passes = len(index.documents) / 400
    assert samples_of_whole_documents(sizes, data) == pytest.approx(2000 / passes, rel=0.03)
    assert samples_of_whole_documents(np.tile(sizes, 100), data) == pytest.approx(
        100 * samples_of_whole_documents(sizes, data), rel=0.02
    )
    assert samples_of_whole_documents(sizes, data.model_copy(update={"packing": "unpacked"})) == 400
    short = {"packing": "unpacked", "allow_chopped": False}
    assert samples_of_whole_documents(sizes, data.model_copy(update=short)) == (sizes <= 25).sum() < 400
