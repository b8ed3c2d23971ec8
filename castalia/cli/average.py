"""`castalia average`: the average of several checkpoints, as a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer


def command(
    words: Annotated[list[str], typer.Argument(metavar="A B C...|SERIES", help="checkpoints, or a series of them")],
    output: Annotated[Path, typer.Option(help="the folder to be written")],
    to: Annotated[Literal["native", "hf"], typer.Option(help="the format of the result")] = "native",
    last: Annotated[int | None, typer.Option(min=1, help="the last so many of a series; default: all of it")] = None,
    steps: Annotated[str | None, typer.Option(help="of a series, as 1000..2000; default: all")] = None,
    ema: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="exponential moving average, with this decay for each step")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="one for each, as 1,1,2; default: equal")] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="of the result; default: that of the weights")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace the folder")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one object at the end, all else on standard error")] = False,
) -> None:
    """Average the weights of checkpoints. average.json beside them says what they are the average of.

    \b
    Examples:
      castalia average runs/first --last 2 --output runs/averaged
      castalia average runs/first runs/second --to hf --output averaged-hf

    Sums are computed in fp64, a piece at a time, from fp32 masters where there are any.
    """
    from contextlib import nullcontext, redirect_stdout
    from dataclasses import replace

    from castalia.checkpoint import convert
    from castalia.checkpoint.file_plan import WriteOptions
    from castalia.checkpoint.opener import open_checkpoint
    from castalia.cli.convert import torch_dtype, write_plan
    from castalia.errors import ConfigError
    from castalia.series.average import averaged, origin_of, origin_output, shares_of
    from castalia.series.members import find_series, opened
    from castalia.strict_json import to_json

    if len(words) == 1 or last or steps:
        chosen = find_series(words, steps)[-last if last else None :]
        checkpoints = [checkpoint for _, checkpoint in opened(chosen)]
    else:
        checkpoints = [open_checkpoint(word) for word in words]
    if len(checkpoints) < 2:
        raise ConfigError(f"{' '.join(words)} is one checkpoint; an average needs two")
    shares = shares_of(len(checkpoints), _numbers(weights) if weights else None, ema)
    result = averaged(checkpoints, shares, torch_dtype(dtype))
    for checkpoint in checkpoints:
        convert.check_destination(Path(checkpoint.path), output, force)
    options = WriteOptions(folder=output.resolve())
    plan = convert.plan_files(to, result, options)
    plan = replace(plan, outputs=(*plan.outputs, origin_output(checkpoints, shares)))
    mark = f"{convert.identity(result, options, plan)} {shares} {[checkpoint.path for checkpoint in checkpoints]}"
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        for checkpoint, share in zip(checkpoints, shares, strict=True):
            print(f"{share:.4f} of {checkpoint.path}, step {checkpoint.progress.step}", flush=True)
        write_plan(plan, output, mark, "", force, False)
    if as_json:
        written = {"files": [each.name for each in plan.outputs], "bytes": plan.num_bytes}
        print(to_json({"path": str(output), "format": to, **origin_of(checkpoints, shares), **written}, indent=1))


def _numbers(text: str) -> list[float]:
    from castalia.errors import ConfigError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights {text}: numbers with commas between them, as 1,1,2") from None
