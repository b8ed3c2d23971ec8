"""Pictures of what two checkpoints have in common, and of how the layers of one run change over its steps."""

from __future__ import annotations

from pathlib import Path

from castalia.examine.diff import Diff
from castalia.examine.layer_changes import LayerHistory
from castalia.figures import panels, plain, shades, write_picture
from castalia.observe.curves import spans_decades


def draw_difference(found: Diff, path: Path, names: str) -> None:
    """Bars: the relative change of each layer, or the ratio of standard deviations of each kind."""
    if found.verdict == "same_init":
        bars, label = {part.part: part.ratio for part in found.parts}, "standard deviation, B / A"
    else:
        bars, label = dict(found.updates), "relative change |B - A| / |A|"
    figure, (axes,) = panels(size=(max(6.0, 0.35 * len(bars) + 2), 4))
    plain([axes])
    axes.bar(range(len(bars)), list(bars.values()), color="#1f77b4")
    axes.set_xticks(range(len(bars)), list(bars), rotation=90)
    axes.set_ylabel(label)
    axes.set_title(f"{names}\n{found.verdict.replace('_', ' ')}", fontsize=10)
    write_picture(figure, path)


def draw_history(found: LayerHistory, path: Path) -> None:
    """A line for each layer over the steps: relative change, norm and cosine."""
    figure, axes = panels(3, size=(9, 9), sharex=True)
    first = found.steps[0]
    kinds = {
        "relative": f"relative change since step {first:,}",
        "norm": "norm of the weights",
        "cosine": f"cosine with step {first:,}",
    }
    steps_apart = spans_decades([step for step in found.steps if step])
    for panel, (kind, label) in zip(axes, kinds.items(), strict=True):
        lines = {layer: [getattr(change, kind) for change in changes] for layer, changes in found.layers.items()}
        for (layer, values), color in zip(lines.items(), shades(len(lines)), strict=True):
            panel.plot(found.steps, values, color=color, label=layer, linewidth=1.3, marker="o", markersize=2.5)
        panel.set_ylabel(label)
        if kind == "norm" and spans_decades([value for values in lines.values() for value in values]):
            panel.set_yscale("log")
        if steps_apart:
            panel.set_xscale("symlog", linthresh=1)
    axes[-1].set_xlabel("step")
    plain(axes)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=8, ncols=1 + len(names) // 40)
    figure.suptitle(f"{found.run}: layers over {len(found.steps)} checkpoints", x=0.01, ha="left", fontweight="bold")
    write_picture(figure, path)
