"""`castalia plot`: loss curves of one or more runs, as a picture and in the terminal."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")


class Curve(NamedTuple):
    steps: list[int]
    values: list[float]


def command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="folders of runs")],
    output: Annotated[
        Path | None, typer.Option(help="the picture, PNG or SVG; default: loss.png in the run's folder")
    ] = None,
) -> None:
    """Curves of one or more runs, overlaid: a picture, and one in the terminal."""
    from castalia.cli.picture import check_picture
    from castalia.errors import DataError
    from castalia.observe.metrics import read_metrics

    check_picture(output, "--output")
    records = {}
    for run in runs:
        if not (Path(run) / "metrics.jsonl").is_file():
            raise DataError(f"{run} holds no metrics.jsonl; give the folder of a run")
        records[Path(run).name or run] = list(read_metrics(Path(run)))
    if len(records) < len(runs):  # equal names in different folders
        records = {run: list(read_metrics(Path(run))) for run in runs}
    if not any(curve(found, "loss").steps for found in records.values()):
        raise DataError(f"no steps to plot yet in {', '.join(runs)}")
    target = output or Path(runs[0]) / "loss.png"
    draw_picture(records, target)
    draw_terminal(records)
    print(f"wrote {target}")


def curve(records: list[dict[str, Any]], name: str) -> Curve:
    """The steps that have a finite value of this name."""
    found = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return Curve([step for step, _ in found], [value for _, value in found])


def smoothed(values: list[float], window: int) -> list[float]:
    """Mean of the values around each one: as many before as after, fewer at the ends."""
    import numpy as np

    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(np.minimum(at, len(values) - 1 - at), window // 2)
    return ((sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)).tolist()


def draw_picture(records: dict[str, list[dict[str, Any]]], target: Path) -> None:
    """Loss on top, gradient norm and learning rate below it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from castalia.cli.picture import write_picture

    figure, (top, middle, bottom) = pyplot.subplots(
        3, 1, figsize=(9, 8), sharex=True, height_ratios=(4, 1.3, 1.3), layout="constrained"
    )
    for number, (name, found) in enumerate(records.items()):
        color = COLORS[number % len(COLORS)]
        loss = curve(found, "loss")
        window = max(1, len(loss.values) // 50)
        if window > 1:
            top.plot(*loss, color=color, alpha=0.25, linewidth=0.8)
        last = f" ({loss.values[-1]:.3f} after {loss.steps[-1]:,} steps)" if loss.steps else ""
        top.plot(loss.steps, smoothed(loss.values, window), color=color, linewidth=1.6, label=name + last)
        valid = curve(found, "valid_loss")
        if valid.steps:
            style = {"marker": "o", "markersize": 4, "linestyle": "--", "linewidth": 1}
            top.plot(*valid, color=color, label=f"{name}, validation ({valid.values[-1]:.3f})", **style)
        middle.plot(*curve(found, "grad_norm"), color=color, linewidth=0.9)
        bottom.plot(*curve(found, "lr"), color=color, linewidth=1.4)
    top.set_ylabel("loss (nats per token)")
    middle.set_ylabel("gradient norm")
    middle.set_yscale("log")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    top.legend(frameon=False)
    for axes in (top, middle, bottom):
        axes.grid(True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    write_picture(figure, target)


def draw_terminal(records: dict[str, list[dict[str, Any]]]) -> None:
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    size = shutil.get_terminal_size((100, 30))
    plotext.plotsize(min(size.columns, 100), min(size.lines - 4, 20))
    for name, found in records.items():
        loss = curve(found, "loss")
        plotext.plot(loss.steps, smoothed(loss.values, max(1, len(loss.values) // 50)), label=name, marker="braille")
        valid = curve(found, "valid_loss")
        if valid.steps:
            plotext.scatter(valid.steps, valid.values, label=f"{name}, validation", marker="x")
    plotext.title("loss")
    plotext.xlabel("step")
    picture = plotext.build()
    print(picture if sys.stdout.isatty() else plotext.uncolorize(picture))
