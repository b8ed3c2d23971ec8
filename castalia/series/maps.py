"""Maps of a series: layers by steps, on a logarithmic axis of steps as papers on training dynamics print them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from castalia.figures import panels, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Mapping[str, Sequence[tuple[int, float]]]  # by layer: (step, value)


def movement_map(movement: Rows, wrong: Sequence[int]) -> Figure:
    """The movement of each layer since the step before, with a mark at the steps where something is wrong."""
    figure, (axes,) = panels(size=(10, max(2.5, 0.3 * len(movement) + 1.5)))
    draw_map(axes, movement, "RMS of the movement since the step before", logarithmic=True)
    for step in wrong:
        axes.axvline(step, color="#d62728", linewidth=0.8, linestyle=":")
    axes.set_xlabel("step; dotted: something is wrong" if wrong else "step")
    return figure


def stats_maps(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Norm, standard deviation, mean and movement of each layer at each step, from the rows of layers."""
    layers = [row for row in rows if not row["tensor"]]
    names = list(dict.fromkeys(row["layer"] for row in layers))
    figure, axes = panels(2, 2, size=(14, max(4.0, 0.5 * len(names) + 2)))
    kinds = (("norm", True), ("std", True), ("mean", False), ("previous_distance", True))
    titles = ("norm", "standard deviation", "mean", "distance from the step before")
    for panel, (kind, logarithmic), title in zip(axes, kinds, titles, strict=True):
        known = [row for row in layers if row[kind] is not None]
        points = {name: [(row["step"], row[kind]) for row in known if row["layer"] == name] for name in names}
        draw_map(panel, points, title, logarithmic)
        panel.set_xlabel("step")
    return figure


def losses_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The losses of all steps over a logarithmic axis of steps."""
    figure, (axes,) = panels(size=(8, 4.5))
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], marker="o", markersize=3)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(str(rows[0]["data"]))
    plain([axes])
    return figure


def draw_map(axes: Axes, rows: Rows, title: str, logarithmic: bool = False) -> None:
    """One map into a panel. Colours are of the logarithm of the values where `logarithmic`."""
    from matplotlib.colors import LogNorm

    steps = sorted({step for points in rows.values() for step, _ in points})
    grid = np.full((len(rows), len(steps)), np.nan)
    for number, points in enumerate(rows.values()):
        for step, value in points:
            grid[number, steps.index(step)] = value
    shown = np.ma.masked_invalid(np.ma.masked_less_equal(grid, 0) if logarithmic else grid)
    norm = LogNorm() if logarithmic and shown.count() else None
    image = axes.pcolormesh(edges(steps), np.arange(len(rows) + 1), shown, cmap="viridis", norm=norm)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_yticks(np.arange(len(rows)) + 0.5, list(rows))
    axes.invert_yaxis()
    axes.set_title(title)
    axes.figure.colorbar(image, ax=axes)


def edges(steps: Sequence[int]) -> np.ndarray:
    """The borders between the columns of steps: half way on a scale that is logarithmic beyond 1."""
    places = np.log1p(np.asarray(steps, np.float64))
    if len(places) == 1:
        return np.expm1(np.array([places[0] - 0.2, places[0] + 0.2]))
    middle = (places[1:] + places[:-1]) / 2
    return np.expm1(np.concatenate([[2 * places[0] - middle[0]], middle, [2 * places[-1] - middle[-1]]]))
