"""`castalia report`: how good a run has become."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from castalia.strict_json import to_json


def command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run, or a checkpoint of any format")],
    others: Annotated[
        list[str] | None, typer.Argument(metavar="[OTHER...]", help="runs or checkpoints judged by the same text")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="the page, one HTML file; default: report.html in the run's folder")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "--text",
            help="judge by this text file or corpus (prefix of .bin and .idx); default: what the run holds out",
        ),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer file, where the checkpoint has none")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="one JSON object instead of text; a page only with --output")
    ] = False,
) -> None:
    """Show how good a run is: bits per byte, curves, samples and whether they are copied, what to do next.

    \b
    Examples:
      castalia report runs/first
      castalia report runs/first runs/second --output report.html
    """
    from castalia.report.report_text import lines
    from castalia.report.run_report import folder_of, write_report

    folder = folder_of(run)
    page = output or (folder / "report.html" if folder and not as_json else None)
    report = write_report(run, page, others=others or [], data=data, tokenizer=tokenizer, say=_say)
    if as_json:
        print(to_json(report.as_json()))
        return
    for line in lines(report, sys.stdout.isatty()):
        print(line)
    print(f"\nwrote {page}" if page else "\n--output report.html writes this as a page")


def _say(line: str) -> None:
    print(line, file=sys.stderr)
