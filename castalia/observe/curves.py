"""Loss curves of runs, drawn from their records: as a figure, and as text for terminals."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from castalia.figures import panels, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")
Records = Mapping[str, Sequence[Mapping[str, Any]]]  # of runs by name, as metrics.jsonl holds them


class Curve(NamedTuple):
    """Values by step, for plotting."""

    steps: list[int]
    values: list[float]


def curve(records: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """The values of one name over the steps that have a finite one."""
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return Curve([step for step, _ in points], [value for _, value in points])


def smoothed(values: list[float], window: int) -> list[float]:
    """A centred moving average over `window` values, which becomes narrower towards both ends."""
    import numpy as np

    # Sums of stretches as differences of cumulative sums.
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(np.minimum(at, len(values) - 1 - at), window // 2)
    return ((sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)).tolist()


def loss_figure(records: Records) -> Figure:
    """A figure with the losses on top, gradient norms and learning rates below."""
    figure, axes = panels(3, size=(9, 8), sharex=True, height_ratios=(4, 1.3, 1.3))
    top, middle, bottom = axes
    for number, (name, steps) in enumerate(records.items()):
        color = COLORS[number % len(COLORS)]
        loss = curve(steps, "loss")
        window = max(1, len(loss.values) // 50)
        if window > 1:
            top.plot(*loss, color=color, alpha=0.25, linewidth=0.8)
        last = f" ({loss.values[-1]:.3f} after {loss.steps[-1]:,} steps)" if loss.steps else ""
        top.plot(loss.steps, smoothed(loss.values, window), color=color, linewidth=1.6, label=name + last)
        valid = curve(steps, "valid_loss")
        if valid.steps:
            style: dict[str, Any] = {"marker": "o", "markersize": 4, "linestyle": "--", "linewidth": 1}
            top.plot(*valid, color=color, label=f"{name}, validation ({valid.values[-1]:.3f})", **style)
        middle.plot(*curve(steps, "grad_norm"), color=color, linewidth=0.9)
        bottom.plot(*curve(steps, "lr"), color=color, linewidth=1.4)
    top.set_ylabel("loss (nats per token)")
    middle.set_ylabel("gradient norm")
    middle.set_yscale("log")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    top.legend(frameon=False)
    plain(axes)
    for panel in axes:
        panel.margins(x=0.01)
    return figure


def terminal_curves(records: Records, colored: bool) -> str:
    """A plot of losses over steps in characters, as wide as the terminal but at most 100 columns."""
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    size = shutil.get_terminal_size((100, 30))
    plotext.plotsize(min(size.columns, 100), min(size.lines - 4, 20))
    for name, steps in records.items():
        loss = curve(steps, "loss")
        plotext.plot(loss.steps, smoothed(loss.values, max(1, len(loss.values) // 50)), label=name, marker="braille")
        valid = curve(steps, "valid_loss")
        if valid.steps:
            plotext.scatter(valid.steps, valid.values, label=f"{name}, validation", marker="x")
    plotext.title("loss")
    plotext.xlabel("step")
    picture = plotext.build()
    return picture if colored else plotext.uncolorize(picture)
