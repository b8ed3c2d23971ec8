"""What is drawn of runs' records: scales, units, panels, and marks that tell runs apart."""

from __future__ import annotations

import io

import pytest

from castalia.observe.curves import curve, loss_figure, loss_unit, smoothed, spans_decades, terminal_curves, ticks


def steps(number: int = 40, **values: float) -> list[dict]:
    return [{"step": n, "loss": 4.0, "tokens": 100 * n, "seconds": 2.0} | values for n in range(1, number + 1)]


def test_smoothing_keeps_constants_ends_and_means():
    assert smoothed([2.0] * 7, 5) == pytest.approx([2.0] * 7)
    assert smoothed([0.0, 3.0, 6.0, 0.0], 3) == pytest.approx([0.0, 3.0, 3.0, 0.0])
    assert smoothed([1.0, 5.0], 1) == [1.0, 5.0]


def test_curves_over_steps_tokens_and_time_leave_out_what_is_not_finite():
    records = [*steps(2), {"step": 3, "loss": None, "tokens": 300, "seconds": 5.0}, *steps(1)]
    assert curve(records, "loss").x == [1, 2, 1]
    assert curve(records, "loss", "tokens").x == [100, 200, 100]
    assert curve(records, "loss", "time").x == [2.0, 4.0, 11.0]


def test_time_has_the_unit_that_suits_it():
    for seconds, unit in ((1.0, "seconds"), (10.0, "minutes"), (400.0, "hours")):
        axes = loss_figure({"a": steps(seconds=seconds)}, "time").axes
        assert axes[-1].get_xlabel() == f"{unit} of training"


def test_axes_are_logarithmic_where_values_span_decades():
    assert spans_decades([0.01, 1.0]) and not spans_decades([0.1, 1.0]) and not spans_decades([0.0, 1.0])
    alike = loss_figure({"a": steps(lr=1e-3), "b": steps(lr=2e-3)})
    assert [panel.get_yscale() for panel in alike.axes] == ["linear", "linear"]
    apart = loss_figure({"a": steps(lr=1e-5), "b": steps(lr=1e-2)})
    assert [panel.get_yscale() for panel in apart.axes] == ["linear", "log"]
    assert loss_figure({"a": steps()}, log_y=True).axes[0].get_yscale() == "log"


def test_preferences_have_panels_and_units_of_their_own():
    pairs, singles = steps(margin=0.5, accuracy=1.0, valid_margin=0.4), steps(accuracy=1.0, kl=0.1)
    assert loss_unit({"a": steps()}) == "nats per token"
    assert loss_unit({"a": pairs}) == "per pair" and loss_unit({"a": singles}) == "per sequence"
    assert loss_unit({"a": steps(), "b": pairs}) == "each in its own unit"
    panels = loss_figure({"a": pairs}).axes
    assert [panel.get_ylabel() for panel in panels] == ["loss (per pair)", "reward margin", "accuracy"]
    assert [len(panel.lines) for panel in panels] == [1, 2, 2]
    text = terminal_curves({"a": pairs}, colored=False)
    assert all(title in text for title in ("loss (per pair)", "reward margin", "accuracy"))


def test_runs_can_be_told_apart_without_colour():
    first, second = steps(valid_loss=4.5), steps(loss=2.0)
    text = terminal_curves({"one": first, "two": second}, colored=False)
    assert "  a one; A validation\n  b two" in text and "\x1b" not in text
    drawn = text.partition("  a one")[0]
    assert all(mark in drawn for mark in ("aaa", "A", "bbb"))


def test_ticks_are_round_numbers_within_the_range():
    assert ticks(1, 120) == [20, 40, 60, 80, 100, 120]
    assert ticks(0.5, 1.0, 5) == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert ticks(7, 7) == [7]
    assert ticks(1, 5, least=1.0) == [1, 2, 3, 4, 5]


def test_values_that_no_axis_holds_are_left_out():
    records = {"run": [{"step": step, "loss": loss} for step, loss in enumerate((2.0, 1e308, -1e308, 1.0), 1)]}
    assert curve(records["run"], "loss").values == [2.0, 1.0]
    loss_figure(records).savefig(io.BytesIO())
    assert "loss" in terminal_curves(records, colored=False)
