from __future__ import annotations

import pytest

from castalia.series.audit import _gaps

PYTHIA = [0, *(2**n for n in range(10)), *range(1000, 21_000, 1000)]


@pytest.mark.parametrize("missing", [[64], [1000 * 7], [5000, 6000], [19_000]])
def test_gaps_in_a_regular_series_are_found(missing):
    assert _gaps([step for step in PYTHIA if step not in missing]) == missing


@pytest.mark.parametrize(
    "steps",
    [
        PYTHIA,
        [0, 1, 2, 3, 4, 6, 8, 10, 12],
        [0, 10, 20, 25],
        [3],
        [0, 5],
        [1, 10, 100, 1000],
        [0, 3, 7, 20],
        [0, 1, 2, 4, 8, 16, 32, 40],
    ],
)
def test_other_distances_are_no_gaps(steps):
    assert _gaps(steps) == []
