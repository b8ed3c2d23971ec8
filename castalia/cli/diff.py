"""`castalia diff`: what two checkpoints have in common, and a verdict in words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from castalia.strict_json import to_json

if TYPE_CHECKING:
    from castalia.examine.diff import Diff
    from castalia.examine.layer_changes import LayerHistory

SHOWN = 12  # tensors in the table


def command(
    a: Annotated[str, typer.Argument(metavar="A", help="a run, or a checkpoint of any format")],
    b: Annotated[
        str | None, typer.Argument(metavar="[B]", help="another one; its format may be another; none with --all-steps")
    ] = None,
    step_a: Annotated[int | None, typer.Option(help="which checkpoint of A; default: the latest")] = None,
    step_b: Annotated[int | None, typer.Option(help="which checkpoint of B; default: the latest")] = None,
    config_a: Annotated[str | None, typer.Option(help="A's training config, where none lies with the files")] = None,
    config_b: Annotated[str | None, typer.Option(help="B's training config, where none lies with the files")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="counts, figures of each tensor and the verdict")] = False,
    plot: Annotated[Path | None, typer.Option(help="a picture of the change in each layer: PNG or SVG")] = None,
    all_steps: Annotated[
        bool,
        typer.Option("--all-steps", help="of A alone: how its layers change over its checkpoints"),
    ] = False,
) -> None:
    """Compare two checkpoints: structure, tensors, verdict. Formats, eras and layouts may differ.

    \b
    Examples:
      castalia diff runs/first runs/first --step-a 10 --step-b 20
      castalia diff runs/first runs/second --plot change.png
      castalia diff runs/first --all-steps --plot layers.png
    """
    from castalia.bars import progress
    from castalia.checkpoint.restore import describe
    from castalia.cli.opening import open_and_tell
    from castalia.errors import ConfigError
    from castalia.examine.diff import diff
    from castalia.figures import check_picture

    check_picture(plot, "--plot")
    if all_steps:
        if b is not None or {step_a, step_b, config_a, config_b} != {None}:
            raise ConfigError("--all-steps takes one run and no steps: castalia diff RUN --all-steps")
        _all_steps(a, as_json, plot)
        return
    if b is None:
        raise ConfigError("name two checkpoints to compare, or one run with --all-steps")
    left = open_and_tell(a, step=step_a, config=config_a)
    right = open_and_tell(b, step=step_b, config=config_b)
    with progress(len(left.model.keys() & right.model.keys()), shown=not as_json) as advance:
        comparison = diff(left, right, lambda name: advance(1, name))
    if as_json:
        print(to_json({"a": str(left.path), "b": str(right.path), **comparison.as_json()}, indent=2))
    else:
        print(f"A: {a}  ({describe(left)})\nB: {b}  ({describe(right)})\n")
        _show(comparison)
    if plot is not None:
        _plot(comparison, plot, f"{a}, step {left.progress.step:,} | {b}, step {right.progress.step:,}")
        if not as_json:
            print(f"\nwrote {plot}")


def _show(found: Diff) -> None:
    from castalia.cli.render import say
    from castalia.examine.diff import CAUSES

    for line in found.structure:
        say(f"  {line}")
    counts = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in found.counts.items())
    say(f"{len(found.relations)} tensors in both: {counts or 'none'}")
    say(found.optimizer)
    differing = [
        (name, relation)
        for name, relation in found.relations.items()
        if relation.kind != "identical" and relation.figures
    ]
    if differing:
        print(f"\n{'tensor':34} {'relation':15} {'max |Δ|':>9} {'relative':>9} {'corr.':>7}")
    for name, relation in differing[:SHOWN]:
        figures = relation.figures
        assert figures is not None
        numbers = f"{figures.max_diff:9.3g} {figures.relative:9.3g} {figures.correlation:7.3f}"
        print(f"{name:34} {relation.kind:15} {numbers}")
    if len(differing) > SHOWN:
        print(f"... and {len(differing) - SHOWN} more; --json lists all")
    if found.verdict in ("same_init", "unrelated", "fine_tune", "siblings"):
        print(f"\n{'kind':16} {'tensors':>7} {'std A':>10} {'std B':>10} {'B / A':>8}")
        for part in found.parts:
            print(f"{part.part:16} {part.tensors:7} {part.std_a:10.5f} {part.std_b:10.5f} {part.ratio:8.4f}")
    if found.verdict in ("fine_tune", "siblings"):
        print("\nrelative change by layer")
        for layer, change in found.updates.items():
            print(f"{layer:16} {change:8.4f}")
    say(f"\nverdict: {found.words}")
    if found.verdict == "same_init":
        print("what is known to cause this with equal seeds:")
        for cause in CAUSES:
            say(f"  - {cause}")


def _plot(found: Diff, path: Path, names: str) -> None:
    """Bars: the relative change of each layer, or the ratio of standard deviations of each kind."""
    from castalia.figures import panels, plain, write_picture

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


def _all_steps(run: str, as_json: bool, plot: Path | None) -> None:
    """How the layers of one run change over its checkpoints: a table of the last one, JSON with all, a picture."""
    from castalia.bars import progress
    from castalia.checkpoint.opener import find_steps
    from castalia.cli.render import print_table
    from castalia.examine.layer_changes import layer_history

    with progress(len(find_steps(run)), shown=not as_json) as advance:
        history = layer_history(run, lambda step: advance(1, step))
    first, last = history.steps[0], history.steps[-1]
    if as_json:
        print(to_json(history.as_json(), indent=1))
    else:
        rows = [
            [layer, f"{changes[-1].norm:.4g}", f"{changes[-1].relative:.4f}", f"{changes[-1].cosine:.4f}"]
            for layer, changes in history.layers.items()
        ]
        title = f"{run}: layers at step {last:,} beside step {first:,} ({len(history.steps)} checkpoints)"
        print_table(title, ["layer", "norm", "relative change", "cosine"], rows)
    if plot is not None:
        _plot_history(history, plot)
        if not as_json:
            print(f"wrote {plot}")


def _plot_history(found: LayerHistory, path: Path) -> None:
    """A line for each layer over the steps: relative change, norm and cosine."""
    from castalia.figures import panels, plain, shades, write_picture
    from castalia.observe.curves import spans_decades

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
