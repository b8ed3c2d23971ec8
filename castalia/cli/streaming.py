"""What `eval`, `generate`, `plan` and `convert` say of models that are read from disk block by block."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from castalia.cli.render import progress, size_of
from castalia.units import duration

if TYPE_CHECKING:
    from castalia.plan.stream_plan import StreamPlan
    from castalia.streaming.streamed_model import StreamedTransformer

MemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="use no more, as 4GB: blocks that have no room are read from disk again in each pass; "
        "default: as much as is free, for a model that does not fit",
    ),
]


def memory_bytes(text: str | None, tp: int = 1, pp: int = 1) -> int | None:
    """The option's bytes. Raises ConfigError for what is no amount, and for several processes."""
    from castalia.errors import ConfigError
    from castalia.plan.free_memory import parse_memory

    if text is not None and tp * pp > 1:
        raise ConfigError("--memory is for one process: leave out --tp and --pp, or leave it out")
    return None if text is None else parse_memory(text)


def tell_streaming(model: StreamedTransformer, item: str, unit: str, times: int = 1) -> None:
    """Before anything is computed, on standard error: what stays, what is read, how fast, and how long it will take.

    `item`: of what passes take several; `unit`: what one pass is for the user; `times`: passes for each item.
    """
    import torch

    from castalia.train.hardware import present_flops

    rate, flops = model.reader.measure(), present_flops(model.compute_dtype or torch.float32)
    for line in streaming_lines(model.plan, rate, flops, item, unit, times):
        print(line, file=sys.stderr, flush=True)


def streaming_lines(
    plan: StreamPlan, rate: float, flops: float | None, item: str, unit: str, times: int = 1
) -> list[str]:
    """`rate`: bytes per second of the disk; `flops`: operations per second of matrix products, None if not known."""
    blocks, stay = len(plan.sizes.blocks), len(plan.resident)
    head = "the head" if plan.head_stays else "not the head"
    lines = [
        f"memory {size_of(plan.budget)}: {stay} of {blocks} blocks and {head} stay in memory; each pass reads "
        f"{size_of(plan.bytes_per_pass)} from disk for {plan.items} of {plan.work.wanted} {item} at a time"
    ]
    if plan.cache_on_disk:
        cache = plan.items * plan.work.cache_each
        lines.append(f"{size_of(cache)} of that are keys and values, which have no room and are in a file meanwhile")
    seconds = plan.seconds_per_pass(rate, flops)
    reading = plan.bytes_per_pass / rate
    bound = "by reading" if seconds <= reading else "by computing"
    number = plan.passes * times
    rest = f", {number} passes {duration(seconds * number)}" if number > 1 else ""
    lines.append(f"the disk gives {size_of(rate)}/s: about {duration(seconds)} {unit}, bound {bound}{rest}")
    if plan.bytes_per_pass and seconds <= reading:
        lines.append(f"faster with {_faster(plan, item)}")
    return lines


def _faster(plan: StreamPlan, item: str) -> str:
    whole = plan.budget + plan.bytes_per_pass
    ways = [f"more memory ({size_of(whole)} would read nothing again)"]
    if plan.items == plan.work.wanted:
        ways.insert(0, f"more {item} at once, which cost no more reading")
    return " or ".join(ways)


@contextmanager
def block_progress(model: StreamedTransformer | None, passes: int | None = None) -> Iterator[None]:
    """A bar over the blocks of so many passes, where it does not come between pieces of text on the same terminal."""
    if model is None:
        yield
        return
    total = passes and passes * model.cfg.num_layers
    with progress(total, shown=not sys.stdout.isatty()) as model.advance:
        yield
