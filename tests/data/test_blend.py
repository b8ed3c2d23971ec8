import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castalia.data.blend import blend, normalized, weights_by_documents
from castalia.errors import DataError


def naive(weights: list[float], size: int) -> tuple[list[int], list[int]]:
    taken, choices, samples = [0] * len(weights), [], []
    for s in range(size):
        errors = [weight * max(s, 1) - count for weight, count in zip(weights, taken, strict=True)]
        chosen = errors.index(max(errors))
        choices.append(chosen)
        samples.append(taken[chosen])
        taken[chosen] += 1
    return choices, samples


def test_the_originals_order(fixtures: Path) -> None:
    choice, sample = blend(normalized([0.1, 0.25, 0.65]), 1000)
    for name, array in (("dataset_index", choice), ("dataset_sample_index", sample)):
        expected = np.load(fixtures / "data" / "blend" / f"pure_{name}.npy")
        assert array.dtype == expected.dtype and np.array_equal(array, expected)


awkward = st.sampled_from([1.0, 2.0, 3.0, 1e-6, 1e-3, 0.1, 1 / 3, 1e6])


@given(st.lists(awkward | st.floats(1e-3, 1.0), min_size=1, max_size=9), st.integers(0, 1500))
def test_equals_one_step_after_the_other(weights: list[float], size: int) -> None:
    shares = normalized(weights)
    choice, sample = blend(shares, size)
    assert (choice.tolist(), sample.tolist()) == naive(shares.tolist(), size)


def test_equals_one_step_after_the_other_when_long() -> None:
    shares = normalized(np.random.RandomState(0).rand(8).tolist())
    choice, sample = blend(shares, 60_000)
    assert (choice.tolist(), sample.tolist()) == naive(shares.tolist(), 60_000)


def test_weights_by_documents(fixtures: Path) -> None:
    known = json.loads((fixtures / "data" / "vectors.json").read_text())["weights_by_num_documents"]
    assert weights_by_documents(known["docs"], known["alpha"]).tolist() == pytest.approx(known["weights"], rel=1e-14)
    assert weights_by_documents([7], 0.3).tolist() == [1.0]


def test_too_many_corpora() -> None:
    with pytest.raises(DataError, match="254"):
        blend(normalized([1.0] * 255), 10)
