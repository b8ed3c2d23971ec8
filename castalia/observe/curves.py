"""Curves of runs, drawn from their records: as a figure, and as text for terminals."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from castalia.figures import panels, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")
Records = Mapping[str, Sequence[Mapping[str, Any]]]  # of runs by name, as metrics.jsonl holds them
X = Literal["step", "tokens", "time"]

MEASURES = {  # panels below the losses
    "margin": "reward margin",
    "accuracy": "accuracy",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
}
PREFERENCES = ("margin", "accuracy")  # which only runs that learn from preferences have
TIME_UNITS = ((7200.0, 3600.0, "hours"), (120.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))  # from so many seconds on


class Curve(NamedTuple):
    """Values over steps, tokens or seconds."""

    x: list[float]
    values: list[float]


DRAWABLE = 1e100  # the difference of larger numbers, and so the length of an axis, may overflow


def curve(records: Sequence[Mapping[str, Any]], name: str, x: X = "step") -> Curve:
    """The values of one name, where they can be drawn, over `x`; `time` is in seconds of the steps alone."""
    seconds = accumulate(record.get("seconds") or 0.0 for record in records) if x == "time" else iter(())
    places = seconds if x == "time" else (record.get(x) for record in records)
    points = [
        (place, value)
        for place, record in zip(places, records, strict=True)
        if (value := record.get(name)) is not None and place is not None and max(abs(value), place) < DRAWABLE
    ]
    return Curve([place for place, _ in points], [value for _, value in points])


def curves_of(steps: Sequence[Mapping[str, Any]], x: X) -> dict[str, dict[str, list[float]]]:
    """All that is drawn of a run, by name: places on the axis (`time`: seconds) and values."""
    own = ["loss", "valid_loss", *MEASURES, *(f"valid_{name}" for name in PREFERENCES)]
    return {name: found._asdict() for name in own if (found := curve(steps, name, x)).x}


def smoothed(values: list[float], window: int) -> list[float]:
    """A centred moving average over `window` values, which becomes narrower towards both ends."""
    import numpy as np

    # Sums of stretches as differences of cumulative sums.
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(np.minimum(at, len(values) - 1 - at), window // 2)
    return ((sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)).tolist()


def spans_decades(values: Sequence[float], decades: float = 1.5) -> bool:
    """Whether positive values lie so far apart that a linear axis shows the largest alone."""
    return bool(values) and min(values) > 0 and max(values) > min(values) * 10**decades


def loss_unit(records: Records) -> str:
    """What a loss is a mean over."""
    units = {_unit(steps) for steps in records.values()}
    return units.pop() if len(units) == 1 else "each in its own unit"


def _unit(steps: Sequence[Mapping[str, Any]]) -> str:
    names = {name for step in steps for name in step}
    return "per sequence" if "kl" in names else "per pair" if "accuracy" in names else "nats per token"


def measured(records: Records, names: Sequence[str]) -> list[str]:
    """Those of the names that some run has values of."""
    return [name for name in names if any(curve(steps, name).x for steps in records.values())]


def loss_figure(records: Records, x: X = "step", log_y: bool = False) -> Figure:
    """A figure with the losses on top, and below them what else was measured. `log_y`: of the losses."""
    names, size, label = measured(records, list(MEASURES)), *_x_unit(records, x)
    legend = 0.45 * len(records) if len(records) > 1 else 0.0  # inches, for two lines of each run above the panels
    height, ratios = 4.5 + 1.75 * len(names) + legend, (4, *(1.3 for _ in names))
    figure, axes = panels(1 + len(names), size=(9, height), sharex=True, height_ratios=ratios)
    top, *others = axes
    for color, (run, steps) in zip(_cycled(COLORS, len(records)), records.items(), strict=True):
        _draw_loss(top, run, steps, color, x, size)
        for panel, name in zip(others, names, strict=True):
            _draw(panel, curve(steps, name, x), size, color=color, linewidth=1.0)
            if name in PREFERENCES:
                _draw(panel, curve(steps, f"valid_{name}", x), size, color=color, **VALIDATION)
    top.set_ylabel(f"loss ({loss_unit(records)})")
    if log_y or spans_decades(_means(records)):
        top.set_yscale("log")
    for panel, name in zip(others, names, strict=True):
        panel.set_ylabel(MEASURES[name])
        if name not in PREFERENCES and spans_decades(_to_tell_apart(records, name)):
            panel.set_yscale("log")
        elif name == "lr":
            panel.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes[-1].set_xlabel(label)
    if len(records) == 1:
        top.legend(frameon=False)
    else:  # long labels would hide the curves
        figure.legend(loc="outside upper left", frameon=False)
    plain(axes)
    for panel in axes:
        panel.margins(x=0.01)
    return figure


VALIDATION: dict[str, Any] = {"marker": "o", "markersize": 4, "linestyle": "--", "linewidth": 1}


def _draw_loss(axes: Axes, run: str, steps: Sequence[Mapping[str, Any]], color: str, x: X, size: float) -> None:
    """The losses of one run: all of them lightly, their moving average, and those of validation."""
    loss, valid = curve(steps, "loss", x), curve(steps, "valid_loss", x)
    window = max(1, len(loss.values) // 50)
    if window > 1:
        _draw(axes, loss, size, color=color, alpha=0.25, linewidth=0.8)
    last = f" ({loss.values[-1]:.3f} after {curve(steps, 'loss').x[-1]:,} steps)" if loss.values else ""
    means = Curve(loss.x, smoothed(loss.values, window))
    _draw(axes, means, size, color=color, linewidth=1.6, label=run + last)
    if valid.x:
        _draw(axes, valid, size, color=color, label=f"{run}, validation ({valid.values[-1]:.3f})", **VALIDATION)


def _draw(axes: Axes, found: Curve, size: float, **style: Any) -> None:
    axes.plot([place / size for place in found.x], found.values, **style)


def _x_unit(records: Records, x: X) -> tuple[float, str]:
    """The size of a unit on the axis, and the axis' label."""
    if x != "time":
        return 1.0, {"step": "step", "tokens": "tokens"}[x]
    longest = max((curve(steps, "loss", x).x[-1:] or [0.0])[0] for steps in records.values())
    return next((size, f"{unit} of training") for least, size, unit in TIME_UNITS if longest >= least)


def _means(records: Records) -> list[float]:
    """Moving averages of all losses."""
    losses = [curve(steps, "loss").values for steps in records.values()]
    return [value for values in losses for value in smoothed(values, max(1, len(values) // 50))]


def _to_tell_apart(records: Records, name: str) -> list[float]:
    """The values that decide upon the scale: of rates only each run's peak, since a schedule may end at nothing."""
    runs = [curve(steps, name).values for steps in records.values()]
    return [max(values) for values in runs if values] if name == "lr" else [value for each in runs for value in each]


def _cycled(kinds: Sequence[str], number: int) -> list[str]:
    return [kinds[index % len(kinds)] for index in range(number)]


def terminal_curves(records: Records, colored: bool, x: X = "step", log_y: bool = False) -> str:
    """Plots of losses, and of margins and accuracies where there are some, as wide as the terminal but at most 100."""
    size = shutil.get_terminal_size((100, 30))
    width, height = min(size.columns, 100), min(size.lines - 4, 20)
    log_y = log_y or spans_decades(_means(records))
    pictures = [_terminal(records, "loss", f"loss ({loss_unit(records)})", (width, height), x, log_y)]
    for name in measured(records, PREFERENCES):
        pictures.append(_terminal(records, name, MEASURES[name], (width, min(height, 12)), x, False))
    import plotext

    return "\n".join((*(each if colored else plotext.uncolorize(each) for each in pictures), *_legend(records)))


def _legend(records: Records) -> Iterator[str]:
    for number, (run, steps) in enumerate(records.items()):
        line, point = _markers(number, len(records))
        validation = f"; {point} validation" if curve(steps, "valid_loss").x else ""
        yield f"  {LINE_MARKERS.get(line, line)} {run}{validation}"


LINE_MARKERS = {"braille": "⠤"}  # by plotext's name


def _markers(number: int, runs: int) -> tuple[str, str]:
    """How a run and its validation are drawn: of several runs each has a letter, and its capital."""
    letter = chr(ord("a") + number % 26)
    return (letter, letter.upper()) if runs > 1 else ("braille", "x")


def _terminal(records: Records, name: str, title: str, size: tuple[int, int], x: X, log_y: bool) -> str:
    """One plot."""
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(*size)
    unit, label = _x_unit(records, x)
    ends, heights = list[float](), list[float]()
    for number, steps in enumerate(records.values()):
        line, point = _markers(number, len(records))
        found, valid = curve(steps, name, x), curve(steps, f"valid_{name}", x)
        places, means = [place / unit for place in found.x], smoothed(found.values, max(1, len(found.values) // 50))
        ends, heights = ends + places[:1] + places[-1:], heights + means + valid.values
        plotext.plot(places, means, marker=line)
        if valid.x:
            plotext.scatter([place / unit for place in valid.x], valid.values, marker=point)
    if ends:
        _set_ticks(plotext.xticks, ticks(min(ends), max(ends), least=0.0 if x == "time" else 1.0))
    if log_y:
        plotext.yscale("log")
    elif heights:
        _set_ticks(plotext.yticks, ticks(min(heights), max(heights), 6))
    plotext.title(title)
    plotext.xlabel(label)
    return plotext.build().rstrip("\n")


def _set_ticks(put: Callable[[list[float], list[str]], object], places: list[float]) -> None:
    put(places, [f"{place:,g}" for place in places])


def ticks(low: float, high: float, most: int = 8, least: float = 0.0) -> list[float]:
    """Round numbers between two others: multiples of 1, 2 or 5 times a power of ten, `least` or more apart."""
    rough = max((high - low) / most, least) or 1.0
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]
