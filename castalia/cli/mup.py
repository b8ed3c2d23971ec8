"""`castalia mup`: does a config's parametrization let learning rates carry over from one width to another?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from castalia.strict_json import to_json

app = typer.Typer(no_args_is_help=True, help="Check the maximal-update parametrization.")


@app.callback()  # without it, typer would take the only command for `mup` itself
def _mup() -> None:
    """Check the maximal-update parametrization."""


@app.command()
def check(
    words: Annotated[list[str], typer.Argument(metavar="CONFIG... [KEY=VALUE...]", show_default=False)],
    widths: Annotated[str, typer.Option(help="hidden sizes, heads keep theirs")] = "64,128,256",
    steps: Annotated[int, typer.Option(min=1, help="of training, on one random batch")] = 3,
    output: Annotated[Path | None, typer.Option(help="also a picture: PNG or SVG")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one object instead of a table")] = False,
) -> None:
    """Tell whether learning rates that were tuned at one width hold at others.

    \b
    Examples:
      castalia mup check run.yml
      castalia mup check run.yml --widths 32,64 --output coordinates.png

    The config's model trains for a few steps at several widths, with muP and without. Where activations move alike at
    every width, a rate that is right for one is right for all; exit code 2 if they grow under muP. See
    docs/scaling.md.
    """
    from castalia.cli.config import read
    from castalia.cli.render import print_curves, say
    from castalia.config.schema import complete
    from castalia.errors import TrainingError
    from castalia.figures import check_picture
    from castalia.tune.mup_check import coordinate_check, judge, slopes

    check_picture(output, "--output")
    config = complete(read(words))
    sizes = _widths(widths)
    model = config.model.with_(
        {
            "vocab_size": min(config.model.vocab_size or 256, 1024),
            "max_positions": config.model.max_positions or config.data.seq_length,
        }
    )
    movements = {
        name: coordinate_check(model, config.optimizer, sizes, mup=mup, steps=steps, seed=config.seed)
        for name, mup in (("muP", True), ("standard", False))
    }
    exponents = {name: slopes(sizes, rows) for name, rows in movements.items()}
    mup, width = config.model.mup, config.model.hidden_size
    verdict = judge(exponents["muP" if mup else "standard"], mup is not None, (mup and mup.base_width) or width)
    if as_json:
        print(to_json({"widths": sizes, "movement": movements, "slopes": exponents, "verdict": verdict._asdict()}))
    else:
        _table(sizes, movements, exponents)
        curves = {f"{kind} logits": [math.log2(value) for value in rows["logits"]] for kind, rows in movements.items()}
        ticks = {math.log2(width): str(width) for width in sizes}
        print_curves("log2 of the movement, over the width", list(ticks), curves, ticks)
    if output:
        _draw_picture(sizes, movements, output)
    if not as_json:
        say(f"verdict: {verdict.words}")
    under_mup = judge(exponents["muP"], True, width)
    if not under_mup.carries_over:
        raise TrainingError(f"{under_mup.words}; lower optimizer.lr")


def _widths(text: str) -> list[int]:
    from castalia.errors import ConfigError

    parts = text.split(",")
    if len(parts) < 2 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ConfigError(f"--widths {text}: give two or more whole numbers such as 64,128,256")
    return sorted(int(part) for part in parts)


def _table(widths: list[int], movements: dict, exponents: dict) -> None:
    print(f"{'movement of':<20}" + "".join(f"{width:>11}" for width in widths) + "     grows like")
    for kind, rows in movements.items():
        for name, values in rows.items():
            numbers = "".join(f"{value:11.4g}" for value in values)
            print(f"{kind + ' ' + name:<20}{numbers}     width^{exponents[kind][name]:+.2f}")


def _draw_picture(widths: list[int], movements: dict, target: Path) -> None:
    from castalia.figures import panels, plain, write_picture

    figure, axes = panels(1, len(movements), size=(10, 4), sharey=True)
    for panel, (kind, rows) in zip(axes, movements.items(), strict=True):
        for name, values in rows.items():
            panel.plot(widths, values, marker="o", markersize=4, linewidth=1.4, label=name)
        panel.set_title(kind)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(widths, [str(width) for width in widths])
        panel.set_xlabel("width")
    plain(axes)
    axes[0].set_ylabel("mean |change of the activation|")
    axes[0].legend(frameon=False, fontsize=8)
    write_picture(figure, target)
    print(f"wrote {target}")
