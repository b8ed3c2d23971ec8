import pytest

from castalia.observe.curves import smoothed


def test_smoothing_keeps_constants_ends_and_means():
    assert smoothed([2.0] * 7, 5) == pytest.approx([2.0] * 7)
    assert smoothed([0.0, 3.0, 6.0, 0.0], 3) == pytest.approx([0.0, 3.0, 3.0, 0.0])
    assert smoothed([1.0, 5.0], 1) == [1.0, 5.0]
