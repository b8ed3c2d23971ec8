"""`castalia status`: where runs stand."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from castalia.strict_json import to_json
from castalia.units import duration
from castalia.wrapping import WIDTH

if TYPE_CHECKING:
    from rich.table import Table

    from castalia.train.status import RunStatus

STYLES = {"training": "green", "starting": "green", "failed": "red", "died": "red"}
FOLLOW_S = 2.0


def command(
    folders: Annotated[
        list[str] | None, typer.Argument(metavar="RUN|FOLDER...", help="runs, or folders with runs; default: here")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="an array with one object for each run")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="look again every two seconds while a run trains")] = False,
) -> None:
    """Show where runs stand: step, speed, time left, last loss, last save, and whether they are alive.

    \b
    Examples:
      castalia status runs
      castalia status runs/first --follow
    """
    from rich.console import Console
    from rich.live import Live

    from castalia.train.status import find_runs, read_status

    def look() -> list[RunStatus]:
        return [read_status(run) for path in folders or ["."] for run in find_runs(path)]

    statuses = look()
    if as_json:
        print(to_json([asdict(status) for status in statuses], indent=1))
        return
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    if not follow:
        console.print(_table(statuses))
    else:
        with Live(_table(statuses), console=console, auto_refresh=False) as live:
            while any(status.by for status in statuses):  # as long as a process holds one of the folders
                time.sleep(FOLLOW_S)
                statuses = look()
                live.update(_table(statuses), refresh=True)
    for status in statuses:
        if status.message:
            print(f"{status.folder}: {status.message}")


def _table(statuses: Sequence[RunStatus]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("run", "state", "step", "loss", "valid", "tokens/s", "left", "saved", "events"):
        # Where there is no room for all, these are wrapped and no number is cut.
        wraps = name in ("run", "saved", "events")
        table.add_column(name, justify="left" if wraps or name == "state" else "right", no_wrap=not wraps)
    for status in statuses:
        table.add_row(
            Text(status.folder, overflow="fold"),
            Text(status.state, style=STYLES.get(status.state, "")),
            f"{status.step:,}" + (f"/{status.steps:,}" if status.steps else ""),
            _number(status.loss, ".4f"),
            _number(status.valid_loss, ".4f"),
            _number(status.tokens_per_second, ",.0f"),
            "-" if status.seconds_left is None else duration(status.seconds_left),
            "never"
            if status.saved_step is None
            else f"step {status.saved_step:,}, {duration(status.saved_seconds_ago or 0.0)} ago",
            ", ".join(f"{count} {kind}" for kind, count in status.events.items()) or "-",
        )
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
