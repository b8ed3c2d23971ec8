"""`castalia start`: from a folder of text to a trained model."""

from __future__ import annotations

import shlex
import sys
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from castalia.strict_json import to_json

HOURS = 1.0


def command(
    folder: Annotated[Path, typer.Argument(help="a folder with txt, md, html, jsonl or parquet files; or one file")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE...]", help="any setting instead of the chosen one")
    ] = None,
    hours: Annotated[float | None, typer.Option(min=0.01, help=f"time for everything  [default: {HOURS:g}]")] = None,
    size: Annotated[str | None, typer.Option(help="instead: parameters, such as 5M; the plan says the time")] = None,
    output: Annotated[
        Path | None, typer.Option(help="the run's folder  [default: runs/ and the folder's name]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="look, measure and say the plan; write nothing")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one object at the end, all else on standard error")] = False,
) -> None:
    """Train a model on a folder of text, in the time that you have.

    \b
    Examples:
      castalia start notes --hours 9
      castalia start notes --hours 9 --dry-run

    Looks at the text, measures this machine, chooses model and training for the time and says why, learns a
    vocabulary, trains, judges the model by text that it never saw, and reports. If it is stopped, the same
    command continues it.
    """
    begin = time.monotonic()  # looking and preparing count towards the hours
    from castalia.quickstart.start_words import check_words, parameters_of

    parameters = parameters_of(size, hours)
    check_words(words or [])
    from castalia.quickstart.start_run import start_run

    run = output or Path("runs") / (folder.resolve().stem or "text")
    wanted = None if parameters else hours or HOURS
    # Compared when the command is given again, perhaps from elsewhere: hence the whole path.
    asked = {"folder": str(folder.resolve()), "hours": wanted, "size": parameters, "words": words or []}
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        result = start_run(
            folder,
            run,
            asked,
            begin,
            dry_run=dry_run,
            command=shlex.join(["castalia", *(word for word in sys.argv[1:] if word != "--json")]),
            colored=sys.stdout.isatty(),
            say=lambda line: print(line, flush=True),
        )
    if as_json:
        print(to_json(result, indent=1))
