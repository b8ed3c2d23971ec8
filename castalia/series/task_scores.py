"""Scores of every step of a series in tasks of lm-eval. Needs lm-eval, which is imported here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castalia.bars import Advance
from castalia.checkpoint.tensors import Checkpoint
from castalia.figures import panels, plain
from castalia.series.members import Member
from castalia.series.resuming import identity_of, work_through
from castalia.tasks.harness import TaskModel
from castalia.tasks.task_options import TaskOptions
from castalia.tasks.task_run import run_tasks, weights_digest

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def task_scores(
    members: Sequence[Member],
    options: TaskOptions,
    output: Path | None,
    open_model: Callable[[Checkpoint], TaskModel],
    advance: Advance,
) -> list[dict[str, Any]]:
    """A row for each step, task and metric. Steps whose weights are equal are asked once.

    `output` is that of `evaluate_series`. Raises CheckpointError for a step that cannot be loaded, and
    DataError as `run_tasks` does.
    """
    known: dict[str, list[dict[str, Any]]] = {}
    parts = {f"{number} {member.name}": member for number, member in enumerate(members)}

    def work(part: str) -> list[dict[str, Any]]:
        """The rows of one step."""
        checkpoint = parts[part].open()
        digest = weights_digest(checkpoint)
        if digest not in known:
            known[digest] = list(_scores(run_tasks(open_model(checkpoint), options)))
        return [{"step": parts[part].step, "name": parts[part].name, "weights": digest, **row} for row in known[digest]]

    identity = identity_of(members, "tasks", options)
    by_part = work_through(list(parts), work, identity, output, advance=advance)
    return [row for rows in by_part.values() for row in rows]


def scores_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel for each metric: its values over a logarithmic axis of steps, a line for each task, standard errors."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    figure, axes = panels(len(metrics), size=(8, 3.2 * len(metrics) + 0.8), sharex=True)
    for panel, metric in zip(axes, metrics, strict=True):
        own = [row for row in rows if row["metric"] == metric]
        for task in dict.fromkeys(row["task"] for row in own):
            line = sorted((row["step"], row["value"], row["stderr"] or 0.0) for row in own if row["task"] == task)
            steps, values, errors = zip(*line, strict=True)
            number = tasks.index(task)  # the same in all panels; told apart in grey as well
            style: dict[str, Any] = {"color": f"C{number % 10}", "marker": "osD^vPX*"[number % 8]}
            panel.errorbar(steps, values, yerr=errors, label=task, markersize=4, capsize=2, linewidth=1.2, **style)
        if all(row["value"] > 0 for row in own) and max(r["value"] for r in own) > 100 * min(r["value"] for r in own):
            panel.set_yscale("log")  # perplexities
        panel.set_xscale("symlog", linthresh=1)
        panel.set_ylabel(metric)
        panel.legend(fontsize="small")
    axes[-1].set_xlabel("step")
    plain(axes)
    return figure


def _scores(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Task, metric, value and standard error, from lm-eval's results: keys are `metric,filter`."""
    for task, figures in results["results"].items():
        for key, value in figures.items():
            metric, comma, chosen = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = figures.get(f"{metric}_stderr,{chosen}")
                stderr = float(error) if isinstance(error, int | float) else None
                yield {"task": task, "metric": metric, "value": float(value), "stderr": stderr}
