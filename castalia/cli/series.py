"""`castalia series`: checkpoints of many steps at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from castalia.machine import usable_cores
from castalia.strict_json import to_json

if TYPE_CHECKING:
    from castalia.series.checkup import Checkup
    from castalia.series.members import Member

app = typer.Typer(no_args_is_help=True, add_completion=False)

Words = Annotated[
    list[str],
    typer.Argument(metavar="SERIES...", help="a run, a folder of step folders, owner/name@step*, or a list of them"),
]
Steps = Annotated[str | None, typer.Option(help="only these, as 0..512,1000,2000..; default: all")]
Jobs = Annotated[int | None, typer.Option(min=1, help="threads that read and compute; default: one for each CPU")]


@app.callback()
def series() -> None:
    """Check, measure and evaluate the checkpoints of many steps."""


@app.command()
def check(
    words: Words,
    against: Annotated[str | None, typer.Option(help="a config or a run to compare the steps with")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="read headers, sizes and a sample of the weights")] = False,
    steps: Steps = None,
    jobs: Jobs = None,
    as_json: Annotated[bool, typer.Option("--json", help="one object with every fact")] = False,
    plot: Annotated[Path | None, typer.Option(help="movement of each layer; default name: series-check.png")] = None,
) -> None:
    """Check that each step is what its name says and follows from the one before.

    \b
    Examples:
      castalia series check runs/first
      castalia series check runs/first --quick --json

    Exit code 1 if something is wrong. If it is interrupted, the same command continues it.
    """
    from castalia.bars import progress
    from castalia.figures import check_picture
    from castalia.series.checkup import check_series

    check_picture(plot, "--plot")
    members = find(words, steps)
    run = Path(words[0]) if len(words) == 1 and (Path(words[0]) / "events.jsonl").is_file() else None
    with progress(shown=not as_json) as advance:
        checkup = check_series(
            members,
            against=against,
            quick=quick,
            run=run,
            steps=steps,
            jobs=jobs or default_jobs(),
            advance=advance,
        )
    if as_json:
        print(to_json(_as_json(checkup), indent=1))
    else:
        _show(checkup)
    if plot is not None:
        _plot(checkup, plot)
        if not as_json:
            print(f"wrote {plot}")
    if not checkup.is_fine:
        raise typer.Exit(1)


def find(words: list[str], steps: str | None) -> list[Member]:
    """The members that the words name. Folders that are no steps are left out, as in any listing of files."""
    from castalia.series.members import find_series

    return find_series(words, steps)


def default_jobs() -> int:
    """One thread for each CPU that this process may use, up to eight."""
    return min(8, usable_cores())


def _as_json(found: Checkup) -> dict[str, Any]:
    return {
        "fine": found.is_fine,
        "steps": [report.as_json() for report in found.reports],
        "not_judged": found.unknown,
    }


def _show(found: Checkup) -> None:
    from castalia.cli.render import print_table

    rows = []
    for report in found.reports:
        worst = report.worst
        facts = [fact for fact in report.facts if worst is None or fact.verdict != "fine"]
        shown = [fact.text + ("" if fact.certain else " (inferred)") for fact in facts]
        rows.append([str(report.step), report.verdict, "; ".join(shown)])
    notable = [row for row in rows if row[1] != "fine" or row[2]]
    if notable:
        print_table("what was found", ["step", "verdict", "why"], notable)
    wrong = sum(report.worst is not None for report in found.reports)
    steps = f"{len(found.reports)} steps, {found.reports[0].step} to {found.reports[-1].step}"
    print(f"{steps}: {f'{wrong} are not as they should be' if wrong else 'all fine'}")
    for line in found.unknown:
        print(f"not judged: {line}")


def _plot(found: Checkup, path: Path) -> None:
    from castalia.figures import write_picture
    from castalia.series.maps import movement_map

    wrong = [report.step for report in found.reports if report.worst is not None and report.path]
    write_picture(movement_map(found.movement, wrong), path)


@app.command()
def stats(
    words: Words,
    output: Annotated[Path, typer.Option(help="the table: .csv or .parquet")],
    optimizer: Annotated[bool, typer.Option("--optimizer", help="figures of the moments as well")] = False,
    steps: Steps = None,
    jobs: Jobs = None,
    as_json: Annotated[bool, typer.Option("--json", help="one object that says what was written")] = False,
    plot: Annotated[Path | None, typer.Option(help="maps of layers by steps; default name: series-stats.png")] = None,
) -> None:
    """Measure every tensor and layer at every step: norms, moments of the distribution, movement.

    \b
    Examples:
      castalia series stats runs/first --output stats.csv
      castalia series stats runs/first --optimizer --output stats.parquet --plot maps.png

    Every byte is read once, in small pieces. If it is interrupted, the same command continues it.
    """
    from castalia.bars import progress
    from castalia.figures import check_picture, write_picture
    from castalia.series.maps import stats_maps
    from castalia.series.table import check_table
    from castalia.series.tensor_stats import tensor_stats

    check_table(output)
    check_picture(plot, "--plot")
    members = find(words, steps)
    with progress(shown=not as_json) as advance:
        rows = tensor_stats(
            members,
            output,
            optimizer=optimizer,
            jobs=jobs or default_jobs(),
            advance=advance,
        )
    if plot is not None:
        write_picture(stats_maps(rows), plot)
    _keep(members, rows, output, plot, as_json)


def _keep(
    members: list[Member], rows: list[dict[str, Any]], output: Path | None, plot: Path | None, as_json: bool
) -> None:
    """Write the table, if there is to be one, and say what was written; JSON holds rows that are nowhere else."""
    from castalia.series.resuming import journal_of
    from castalia.series.table import write_table

    if output:
        write_table(output, rows)
        journal_of(output).unlink(missing_ok=True)
    files = [file for file in (output, plot) if file]
    if as_json:
        counts = {"steps": [member.step for member in members], "rows": len(rows), "files": files}
        print(to_json(counts if output else {**counts, "table": rows}, default=str))
        return
    written = f": wrote {' and '.join(map(str, files))}" if files else "; --output FILE keeps them"
    print(f"{len(members)} steps, {len(rows):,} rows{written}")


@app.command(name="eval")
def evaluate(
    words: Words,
    output: Annotated[Path | None, typer.Option(help="the table: .csv or .parquet; default: shown alone")] = None,
    data: Annotated[
        str | None, typer.Option(help="prefix of .bin and .idx; default: the run's validation data")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="texts instead: jsonl, txt and what `data prepare` reads")] = None,
    tasks: Annotated[str | None, typer.Option(help="instead: tasks of lm-eval, as `castalia eval` takes them")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first so many documents of each task")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer file, where the checkpoints have none")] = None,
    steps: Steps = None,
    jobs: Annotated[int, typer.Option(min=1, help="steps that are evaluated at once")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="one object that says what was written")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="losses, or tasks, over steps; default name: series-eval.png")
    ] = None,
) -> None:
    """Compute loss and bits per byte of every step on the same data.

    \b
    Examples:
      castalia series eval runs/first --plot
      castalia series eval runs/first --file texts.jsonl --output losses.csv --plot losses.png

    The next step loads while one is evaluated; equal weights are evaluated once. If it is interrupted, the same command
    continues it.
    """
    from castalia.bars import progress
    from castalia.checkpoint.restore import find_tokenizer
    from castalia.errors import ConfigError
    from castalia.figures import check_picture, write_picture
    from castalia.series.losses import evaluate_series, measure_of
    from castalia.series.maps import losses_figure
    from castalia.series.table import check_table

    check_table(output)
    check_picture(plot, "--plot")
    if sum(map(bool, (data, file, tasks))) > 1:
        raise ConfigError("--data, --file and --tasks exclude each other")
    if limit and not tasks:
        raise ConfigError("--limit belongs to --tasks")
    if tasks and jobs > 1:
        raise ConfigError("--jobs does not act on --tasks; leave it out")
    members = find(words, steps)
    if tasks:
        rows = _task_rows(members, tasks, limit, tokenizer, output, as_json)
        if plot is not None:
            from castalia.series.task_scores import scores_figure

            write_picture(scores_figure(rows), plot)
        if not as_json:
            _show_scores(rows)
        _keep(members, rows, output, plot, as_json)
        return
    checkpoint = members[-1].open()
    measure = measure_of(checkpoint, str(file) if file else data, find_tokenizer(checkpoint, tokenizer))
    with progress(shown=not as_json) as advance:
        rows = evaluate_series(members, measure, output, jobs=jobs, advance=advance)
    if plot is not None:
        write_picture(losses_figure(rows), plot)
    if not as_json:
        _show_losses(rows)
    _keep(members, rows, output, plot, as_json)


def _task_rows(
    members: list[Member], tasks: str, limit: int | None, tokenizer: str | None, output: Path | None, as_json: bool
) -> list[dict[str, Any]]:
    from castalia.bars import progress
    from castalia.cli.tasks import needs_lm_eval, open_for_tasks

    needs_lm_eval()
    from castalia.series.task_scores import task_scores
    from castalia.tasks.task_options import TaskOptions, names_of

    options = TaskOptions(names_of([tasks]), limit=limit)
    with progress(shown=not as_json) as advance:
        return task_scores(
            members,
            options,
            output,
            lambda checkpoint: open_for_tasks(checkpoint, tokenizer)[0],
            advance,
        )


def _show_scores(rows: list[dict[str, Any]]) -> None:
    """A line for each task and metric, a column for each step; of many steps the first, the last and some between."""
    from castalia.cli.render import print_table

    steps = sorted({row["step"] for row in rows})
    shown = steps if len(steps) <= 6 else [steps[round(i * (len(steps) - 1) / 5)] for i in range(6)]
    cells = {(row["task"], row["metric"], row["step"]): row for row in rows}

    def cell(row: dict[str, Any] | None) -> str:
        """The value and its standard error."""
        if row is None:
            return "-"
        return f"{row['value']:.4g}" + (f" ± {row['stderr']:.2g}" if row["stderr"] is not None else "")

    names = dict.fromkeys((row["task"], row["metric"]) for row in rows)
    lines = [[task, metric, *(cell(cells.get((task, metric, step))) for step in shown)] for task, metric in names]
    print_table("tasks by step", ["task", "metric", *map(str, shown)], lines)


def _show_losses(rows: list[dict[str, Any]]) -> None:
    from castalia.cli.render import print_table

    def shown(value: float | None) -> str:
        """Four digits, or a dash."""
        return "-" if value is None else f"{value:.4f}"

    lines = [[str(row["step"]), shown(row["loss"]), shown(row["bits_per_byte"])] for row in rows]
    print_table(f"on {rows[0]['data']}", ["step", "loss", "bits per byte"], lines)


@app.command()
def memorise(
    words: Words,
    output: Annotated[Path | None, typer.Option(help="the table: .csv or .parquet; default: means alone")] = None,
    data: Annotated[str | None, typer.Option(help="a corpus; default: that of the run")] = None,
    steps: Annotated[str | None, typer.Option(help="of the training, whose sequences are asked for: A..B")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="tokens that are given")] = 32,
    continuation: Annotated[int, typer.Option(min=1, help="tokens that are to follow")] = 32,
    panel: Annotated[Path | None, typer.Option(help="these sequences instead: jsonl with tokens or text, step")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="rows of a step, where no config says how many")] = None,
    checkpoints: Annotated[str | None, typer.Option(help="which of the series, as 0..512,1000; default: all")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer file, where the checkpoints have none")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="checkpoints that are asked at once")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="one object that says what was written")] = False,
) -> None:
    """Find which training sequences each checkpoint continues word for word, and how surprised it is by them.

    \b
    Examples:
      castalia series memorise runs/first --steps 1..4 --prompt 4 --continuation 4 --output m.csv
      castalia series memorise runs/first --panel panel.jsonl --prompt 4 --continuation 4 --output m.csv

    One pass over a sequence tells whether greedy decoding would reproduce it. If it is interrupted, the same command
    continues it.
    """
    from castalia.bars import progress
    from castalia.checkpoint.restore import find_tokenizer
    from castalia.config.schema import RunConfig
    from castalia.series.members import parse_steps
    from castalia.series.memorise import memorised, panel_of
    from castalia.series.table import check_table
    from castalia.train.hardware import choose_device, choose_dtype

    check_table(output)
    members = find(words, checkpoints)
    checkpoint = members[-1].open()
    reader = find_tokenizer(checkpoint, tokenizer)
    ranges = parse_steps(steps) if steps else None
    length = prompt + continuation
    asked = panel_of(checkpoint, data, panel, ranges, batch_size, reader, prompt, length)
    config = checkpoint.config or RunConfig()
    device = choose_device(config.train.device)
    rows_of_head = checkpoint.model["embed.weight"].shape[0]
    known = config.model.vocab_size if config.model else None
    with progress(shown=not as_json) as advance:
        rows = memorised(
            members,
            asked,
            output,
            device=device,
            dtype=choose_dtype(config.precision.compute, device),
            vocabulary=min(known or rows_of_head, reader.vocab_size if reader else rows_of_head),
            jobs=jobs,
            advance=advance,
        )
    if not as_json:
        _show_memorised(rows)
    _keep(members, rows, output, None, as_json)


def _show_memorised(rows: list[dict[str, Any]]) -> None:
    from castalia.cli.render import print_table

    steps: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        steps.setdefault(row["step"], []).append(row)

    def mean(group: list[dict[str, Any]], key: str) -> str:
        """Over the sequences of a step; a dash where there are none."""
        return f"{sum(row[key] for row in group) / len(group):.4f}" if group else "-"

    lines = [
        [
            str(step),
            str(sum(row["extractable"] for row in group)),
            mean(group, "matching"),
            mean([row for row in group if row["seen"]], "nll"),
            mean([row for row in group if not row["seen"]], "nll"),
        ]
        for step, group in steps.items()
    ]
    count = len(next(iter(steps.values())))
    print_table(f"{count} sequences", ["step", "extractable", "matching", "nll if seen", "nll if not"], lines)
