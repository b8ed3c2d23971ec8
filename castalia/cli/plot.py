"""`castalia plot`: loss curves of one or more runs, as a picture and in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="folders of runs")],
    output: Annotated[
        Path | None, typer.Option(help="the picture, PNG or SVG; default: loss.png in the run's folder")
    ] = None,
) -> None:
    """Draw curves of one or more runs into a picture and in the terminal.

    \b
    Examples:
      castalia plot runs/first
      castalia plot runs/first runs/second --output both.png
    """
    from castalia.errors import DataError
    from castalia.figures import check_picture, write_picture
    from castalia.observe.curves import curve, loss_figure, terminal_curves
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
    write_picture(loss_figure(records), target)
    print(terminal_curves(records, sys.stdout.isatty()))
    print(f"wrote {target}")
