"""A figure of the memory on each rank."""

from __future__ import annotations

from pathlib import Path

from castalia.figures import panels, write_picture
from castalia.plan.layout import Layout
from castalia.plan.plan_parts import SizedPlan
from castalia.units import GiB, short_number

CATEGORIES = {  # in stacking order; the colours are distinct in grey and for colour-blind readers
    "masters": "#332288",
    "moments": "#6699cc",
    "gradients": "#88ccee",
    "compute_copies": "#44aa99",
    "activations": "#ddcc77",
    "logits": "#cc6677",
    "buffers": "#888888",
}


def plot_memory(layout: Layout, sized: SizedPlan, path: Path, config: str) -> None:
    """Write stacked bars for each pipeline stage with the usable memory, and the fullest rank by recompute policy.

    `layout`, `sized`: of the plan that `run_plan.report` returns. `path`: its ending chooses the format. `config`:
    its name, for the title.
    """
    memory = sized.memory
    stages, usable = memory.stages, memory.usable
    tallest = max(memory.by_recompute.values())
    limit = usable if usable and usable < 4 * tallest else None  # a much higher limit would flatten the bars
    size = (max(8.5, 5 + len(stages)), 4.8)
    figure, (left, right) = panels(1, 2, size=size, width_ratios=[max(2, len(stages)), 2])
    bottoms = [0.0] * len(stages)
    for name, colour in CATEGORIES.items():
        heights = [getattr(stage.memory, name) / GiB for stage in stages]
        if max(heights) * 200 < memory.largest / GiB:
            continue
        label = name.replace("_", " ")
        left.bar(range(len(stages)), heights, 0.7, bottom=bottoms, color=colour, label=label, edgecolor="white")
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    _annotate(left, bottoms)
    left.set_xticks(range(len(stages)), [f"stage {s.stage}\n{s.layers} layers" for s in stages])
    left.set_ylabel("GiB on each rank")
    shape = (
        ", ".join(f"{name} {getattr(layout, name)}" for name in ("tp", "pp", "cp", "dp") if getattr(layout, name) > 1)
        or "one device"
    )
    left.set_title(f"{shape}, zero {layout.zero}, recompute {layout.recompute}", loc="left", fontsize=10)

    policies = memory.by_recompute
    sizes = [size / GiB for size in policies.values()]
    colours = ["#ddcc77" if name == layout.recompute else "#eee5bb" for name in policies]
    right.bar(range(len(policies)), sizes, 0.7, color=colours, edgecolor="white")
    _annotate(right, sizes)
    right.set_xticks(range(len(policies)), list(policies))
    right.set_title("fullest rank by recompute policy", loc="left", fontsize=10)
    for axes, top in ((left, max(bottoms)), (right, max(sizes))):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0, 1.18 * max(top, limit / GiB if limit else 0))
        axes.margins(x=0.3 if len(axes.get_xticks()) == 1 else 0.05)
        if limit:
            axes.axhline(limit / GiB, color="black", linewidth=1, linestyle="--")
            axes.annotate(
                f"usable {limit / GiB:.1f}",
                (1, limit / GiB),
                (0, 3),
                ("axes fraction", "data"),
                "offset points",
                ha="right",
            )
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    room = "" if limit or not usable else f"; {usable / GiB:.1f} GiB are usable"
    title = f"{config}: {short_number(sized.total)} parameters{room}"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    write_picture(figure, path)


def _annotate(axes, heights: list[float]) -> None:
    for place, height in enumerate(heights):
        axes.annotate(f"{height:.3g}", (place, height), (0, 3), textcoords="offset points", ha="center", fontsize=9)
