"""`castalia plot`: curves of one or more runs, as a picture and in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

FOLLOW_S = 5.0


def command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN|FOLDER...", help="runs, or folders with runs below them")],
    output: Annotated[
        Path | None,
        typer.Option(help="the picture, PNG or SVG; default: loss.png in the run's folder, of several beside them"),
    ] = None,
    x: Annotated[Literal["step", "tokens", "time"], typer.Option(help="what the curves are drawn over")] = "step",
    log_y: Annotated[
        bool, typer.Option("--log-y", help="a logarithmic axis for losses; default: where they span decades")
    ] = False,
    follow: Annotated[bool, typer.Option("--follow", help="draw again every five seconds while a run trains")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one object: the picture's file, and the curves")] = False,
) -> None:
    """Draw curves of one or more runs into a picture and in the terminal.

    \b
    Examples:
      castalia plot runs/first
      castalia plot runs --x tokens --output all.png
    """
    from castalia.errors import ConfigError, DataError
    from castalia.figures import check_picture, write_picture
    from castalia.observe.curves import curves_of, loss_figure, measured, terminal_curves
    from castalia.observe.run_labels import default_picture, records_of, runs_below
    from castalia.strict_json import to_json

    check_picture(output, "--output")
    if follow and as_json:
        raise ConfigError("--json says once what --follow draws again and again: leave one of them out")
    folders = list(dict.fromkeys(folder for path in runs for folder in runs_below(path)))

    def text() -> str:
        return terminal_curves(records_of(folders), sys.stdout.isatty(), x, log_y)

    if follow:
        _follow(folders, text)
    records = records_of(folders)
    if not measured(records, ["loss"]):
        raise DataError(f"no steps to plot yet in {', '.join(map(str, folders))}")
    target = output or default_picture(folders)
    write_picture(loss_figure(records, x, log_y), target)
    if as_json:
        found = [
            {"run": str(folder), "name": name, "curves": curves_of(steps, x)}
            for folder, (name, steps) in zip(folders, records.items(), strict=True)
        ]
        print(to_json({"picture": str(target), "x": x, "runs": found}))
        return
    if not follow:
        print(text())
    print(f"wrote {target}")


def _follow(folders: list[Path], text: Callable[[], str]) -> None:
    """Shows the text, as it changes, as long as a process holds one of the folders."""
    from rich.live import Live
    from rich.text import Text

    from castalia.checkpoint.formats.native.save import in_use

    with Live(Text.from_ansi(text()), auto_refresh=False) as live:
        while any(in_use(folder / "checkpoints") for folder in folders):
            time.sleep(FOLLOW_S)
            live.update(Text.from_ansi(text()), refresh=True)
