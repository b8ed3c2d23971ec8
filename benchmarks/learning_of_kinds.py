"""Draws how models of several layer kinds learn one text, in one small figure for docs/layer-kinds.md.

    python benchmarks/learning_of_kinds.py OUTPUT.png RUN...

Each run is a line, named by its folder: its validation loss at the end, and its training loss as a mean of 15 steps.
"""

from __future__ import annotations

import sys
from pathlib import Path

from castalia.figures import panels, plain
from castalia.observe.metrics import read_metrics

STEPS = 15  # that a point is the mean of


def main(output: str, *runs: str) -> None:
    """Writes the figure."""
    figure, (axes,) = panels(size=(7, 3.6))
    plain([axes])
    for run in runs:
        records = list(read_metrics(Path(run)))
        losses = [record["loss"] for record in records]
        means = [sum(losses[i - STEPS : i]) / STEPS for i in range(STEPS, len(losses) + 1)]
        valid = next(record["valid_loss"] for record in reversed(records) if "valid_loss" in record)
        axes.plot(range(STEPS, len(losses) + 1), means, label=f"{Path(run).name}: {valid:.2f} on held-out text")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(top=6)
    axes.legend(frameon=False)
    figure.savefig(output, dpi=80)


if __name__ == "__main__":
    main(*sys.argv[1:])
