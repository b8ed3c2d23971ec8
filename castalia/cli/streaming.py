"""What `eval`, `generate`, `plan` and `convert` say of models that are read from disk block by block."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from castalia.cli.render import print_table, progress, size_of
from castalia.units import duration

if TYPE_CHECKING:
    from castalia.checkpoint.tensors import Checkpoint
    from castalia.plan.stream_plan import StreamPlan
    from castalia.streaming.streamed_model import StreamedTransformer

ITEMS = (1, 16, 256)  # texts, or windows, for which a plan is shown
PROMPT_TOKENS = 64  # of the texts of a plan

MemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="use no more, as 4GB: blocks that have no room are read from disk again in each pass; "
        "default: as much as is free, for a model that does not fit",
    ),
]


def memory_bytes(text: str | None, tp: int = 1, pp: int = 1) -> int | None:
    """The option's bytes. Raises ConfigError for what is not an amount, and for several processes."""
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


def print_streaming_plan(path: str, generate: bool, memory: str | None, as_json: bool) -> None:
    """Print what stays in memory, what passes read and how long they take, for more and more at once."""
    from castalia.cli.opening import open_and_tell
    from castalia.strict_json import to_json

    checkpoint = open_and_tell(path)
    plans, rate, flops = streaming_plans(checkpoint, generate, memory_bytes(memory))
    rows = [_plan_row(plan, rate, flops) for plan in plans]
    if as_json:
        print(to_json({"disk_bytes_per_second": rate, "flops_per_second": flops, "plans": rows}, indent=1))
        return
    sizes = plans[0].sizes
    blocks, name = len(sizes.blocks), "texts" if generate else "windows"
    print(f"{checkpoint.path}: {blocks} blocks of {size_of(sizes.buffer)}, head {size_of(sizes.head)}")
    print(f"disk {size_of(rate)}/s, matrix products {flops / 1e9:.3g} GFLOP/s, both measured now on this machine")
    shown = [
        [
            f"{row['wanted']:,}",
            f"{row['at_once']:,}",
            f"{row['resident_blocks']} of {blocks}",
            size_of(row["bytes_per_pass"]),
            duration(row["seconds_per_pass"]),
            f"{row['tokens_per_second']:.3g}",
        ]
        for row in rows
    ]
    header = [name, "at once", "blocks that stay", "read in a pass", "time of a pass", "tokens/s"]
    print_table(f"memory {size_of(plans[0].budget)}", header, shown)


def _plan_row(plan: StreamPlan, rate: float, flops: float) -> dict[str, Any]:
    seconds = plan.seconds_per_pass(rate, flops)
    return {
        "wanted": plan.work.wanted,
        "at_once": plan.items,
        "resident_blocks": len(plan.resident),
        "head_stays": plan.head_stays,
        "cache_on_disk": plan.cache_on_disk,
        "bytes_per_pass": plan.bytes_per_pass,
        "seconds_per_pass": seconds,
        "tokens_per_second": plan.items * plan.work.tokens_each / seconds,
    }


def streaming_plans(
    checkpoint: Checkpoint, generate: bool, memory: int | None
) -> tuple[list[StreamPlan], float, float]:
    """Plans for more and more items, the disk's measured rate in bytes per second, and that of matrix products.

    Texts have as many tokens as the checkpoint's config asks for, after prompts of `PROMPT_TOKENS`. Evaluation takes
    micro-batches of one window, which is the run's sequence. Both compute in fp32.
    """
    import torch

    from castalia.checkpoint.restore import architecture
    from castalia.config.schema import RunConfig
    from castalia.generate.generation import PREFILL_CHUNK_TOKENS, Sampling
    from castalia.plan.free_memory import free_memory
    from castalia.plan.stream_plan import EvaluationShape, evaluation_work, generation_work, plan_stream
    from castalia.streaming.open_streamed import SHARE, open_streamed
    from castalia.streaming.stream_units import units_of
    from castalia.train.hardware import present_flops

    model, config = architecture(checkpoint), checkpoint.config or RunConfig()
    units = units_of(checkpoint, model, torch.float32)
    length = min(config.data.seq_length, model.max_positions or config.data.seq_length)
    tokens = config.generate.max_tokens or Sampling().max_tokens
    plans = []
    for wanted in ITEMS:
        if generate:
            work = generation_work(model, PROMPT_TOKENS, tokens, wanted, 4, PREFILL_CHUNK_TOKENS)
        else:
            work = evaluation_work(model, EvaluationShape(length, 1, wanted, config.data.mask_documents), 4)
        plans.append(plan_stream(units.sizes(), work, memory or int(SHARE * free_memory())))
    streamed = open_streamed(checkpoint, model, units, plans[0])
    rate = streamed.reader.measure()
    streamed.reader.close()
    return plans, rate, present_flops(torch.float32)


@contextmanager
def block_progress(model: StreamedTransformer | None, passes: int | None = None) -> Iterator[None]:
    """A bar over the blocks of so many passes, where it does not come between pieces of text on the same terminal."""
    if model is None:
        yield
        return
    total = passes and passes * model.cfg.num_layers
    with progress(total, shown=not sys.stdout.isatty()) as model.advance:
        yield
