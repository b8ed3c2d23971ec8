from __future__ import annotations

import pytest

from castalia.cli.pictures import name_pictures


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("series check RUN --json --plot", "series check RUN --json --plot series-check.png"),
        ("series eval RUN --plot --json", "series eval RUN --plot series-eval.png --json"),
        ("data stats kjv --plot", "data stats kjv --plot data-stats.png"),
        ("diff a b --plot", "diff a b --plot diff.png"),
        ("diff a b --plot own.svg --json", "diff a b --plot own.svg --json"),
        ("diff --plot=own.svg a b", "diff --plot=own.svg a b"),
        ("series check --plot .", "series check --plot series-check.png ."),
        ("plot RUN", "plot RUN"),
        ("", ""),
    ],
)
def test_a_picture_without_a_name_gets_one(line, expected):
    assert name_pictures(line.split()) == expected.split()
