"""The picture of a learning-rate range test."""

from __future__ import annotations

from pathlib import Path

from castalia.figures import panels, plain, write_picture
from castalia.tune.lr_find import RangeTest


def draw_rates(trial: RangeTest, target: Path) -> None:
    """Loss over learning rate, with the suggestion."""
    figure, (axes,) = panels(size=(8, 4.5))
    axes.plot(trial.rates, trial.losses, linewidth=0.8, alpha=0.5, label="loss of each step")
    axes.plot(trial.rates, trial.smoothed, linewidth=1.4, color="#1f77b4", label="smoothed")
    axes.axvline(trial.suggestion, color="#d62728", linestyle="--", label=f"suggested: {trial.suggestion:.1e}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss (nats per token)")
    plain([axes])
    axes.legend(frameon=False)
    write_picture(figure, target)
