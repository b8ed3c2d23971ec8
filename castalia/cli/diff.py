"""`castalia diff`: what two checkpoints have in common, and a verdict in words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from castalia.strict_json import to_json


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
    plot: Annotated[
        Path | None, typer.Option(help="the change in each layer as a picture; default name: diff.png")
    ] = None,
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
    from castalia.examine.diff_text import lines
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
        for line in lines(comparison):
            print(line)
    if plot is not None:
        from castalia.report.diff_figures import draw_difference

        draw_difference(comparison, plot, f"{a}, step {left.progress.step:,} | {b}, step {right.progress.step:,}")
        if not as_json:
            print(f"\nwrote {plot}")


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
        from castalia.report.diff_figures import draw_history

        draw_history(history, plot)
        if not as_json:
            print(f"wrote {plot}")
