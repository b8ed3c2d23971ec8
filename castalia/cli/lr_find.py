"""`castalia lr-find`: a learning-rate range test."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from castalia.units import plural

if TYPE_CHECKING:
    from castalia.tune.lr_find import RangeTest


def command(
    words: Annotated[list[str], typer.Argument(metavar="CONFIG... [KEY=VALUE...]", show_default=False)],
    lowest: Annotated[float, typer.Option(help="the first rate")] = 1e-6,
    highest: Annotated[float, typer.Option(help="the last rate, unless the loss diverges before")] = 1.0,
    steps: Annotated[
        int, typer.Option(min=20, help="number of steps; each multiplies the rate by the same factor")
    ] = 100,
    plot: Annotated[Path | None, typer.Option(help="a picture; default name: lr-find.png")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one object instead of text")] = False,
) -> None:
    """Train with a learning rate that rises at every step until the loss diverges, and suggest optimizer.lr.

    \b
    Examples:
      castalia lr-find run.yml
      castalia lr-find run.yml --steps 40 --plot rates.png

    Writes no run folder. The same config and seed give the same suggestion.
    """
    from castalia.cli.opening import tell
    from castalia.cli.train import split_words
    from castalia.config.load import load_config
    from castalia.errors import ConfigError
    from castalia.figures import check_picture
    from castalia.parallel.process_group import process_group
    from castalia.parallel.rendezvous import is_main

    check_picture(plot, "--plot")
    config = load_config(*split_words(words))
    if not 0 < lowest < highest:
        raise ConfigError(f"--lowest {lowest:g} must be positive and below --highest {highest:g}")
    # Only now, because torch takes a second to import, and what is wrong above is told before.
    from castalia.train.hardware import choose_device
    from castalia.tune.lr_find import find_rate

    with process_group(choose_device(config.train.device).type, config.parallel.timeout):
        trial = find_rate(config, lowest, highest, steps)
    if not is_main():
        return
    tell(trial.notes, str(config.checkpoint.init_from))
    if plot:
        from castalia.tune.rate_figure import draw_rates

        draw_rates(trial, plot)
    if as_json:
        from castalia.observe.metrics import as_line

        print(as_line(trial._asdict()), end="")
    else:
        _tell(trial, words)
        if plot:
            print(f"wrote {plot}")


def _tell(trial: RangeTest, words: list[str]) -> None:
    from castalia.cli.render import print_curves

    marks = {trial.rates.index(trial.suggestion): "falls fastest", trial.rates.index(trial.lowest): "lowest"}
    shown = {*range(0, len(trial.rates), max(1, len(trial.rates) // 20)), *marks}
    print("learning rate      loss  smoothed")
    for number in sorted(shown):
        mark = f"  {marks[number]}" if number in marks else ""
        print(f"{trial.rates[number]:>13.2e}  {trial.losses[number]:>8.4f}  {trial.smoothed[number]:>8.4f}{mark}")
    powers = range(math.ceil(math.log10(trial.rates[0])), math.floor(math.log10(trial.rates[-1])) + 1)
    drawn = {math.log10(rate): loss for rate, loss in zip(trial.rates, trial.smoothed, strict=True) if loss < math.inf}
    ticks = {float(power): f"1e{power:+03}" for power in powers}
    print_curves("loss, over the learning rate", list(drawn), {"smoothed": list(drawn.values())}, ticks)
    end = "where the loss diverged" if trial.diverged else "the last one"
    print(f"{plural(len(trial.rates), 'step')}, up to a rate of {trial.rates[-1]:.2e}, {end}")
    print("the smoothed loss falls fastest at the rate of this line; for a long run a third of it is safer:")
    print(f"castalia train {shlex.join(words)} optimizer.lr={trial.suggestion:.1e}")
