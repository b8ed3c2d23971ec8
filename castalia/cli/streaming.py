"""What `eval`, `generate`, `plan` and `convert` say of models that are read from disk block by block."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from castalia.bars import progress
from castalia.cli.render import print_table, say
from castalia.strict_json import to_json
from castalia.units import duration, file_size

if TYPE_CHECKING:
    from castalia.config.schema import ModelConfig, RunConfig
    from castalia.plan.stream_plan import StreamedSizes, StreamPlan
    from castalia.streaming.streamed_model import StreamedTransformer
    from castalia.streaming.streamed_ranks import StreamedSplit

ITEMS = (1, 16, 256)  # texts, or windows, for which a plan is shown
PROMPT_TOKENS, TEXT_TOKENS = 64, 64  # of the texts of a plan
DISK_RATES = (0.5e9, 2e9, 7e9)  # bytes per second: SATA, and two generations of NVMe

MemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="use no more than this, such as 4GB: blocks that have no room are read from disk again in each pass; "
        "default: as much as is free, for a model that does not fit",
    ),
]


def memory_bytes(text: str | None) -> int | None:
    """The option's bytes. Raises ConfigError for what is not an amount."""
    from castalia.units import parse_size

    return None if text is None else parse_size(text, "--memory")


def tell_streaming(model: StreamedTransformer | StreamedSplit, item: str, unit: str, times: int = 1) -> None:
    """Before anything is computed, on standard error: what stays, what is read, how fast, and how long it will take.

    `item`: of what passes take several; `unit`: what one pass is for the user; `times`: passes for each item.
    """
    import torch

    from castalia.parallel.rendezvous import is_main, world_size
    from castalia.streaming.streamed_model import streamed_stage
    from castalia.train.hardware import present_flops

    stage = streamed_stage(model)
    if stage is None or not is_main():
        return
    flops = present_flops(stage.compute_dtype or torch.float32) if stage.device.type == "cpu" else None
    lines = streaming_lines(stage.plan, stage.reader.measure(), flops, item, unit, times)
    if world_size() > 1:
        lines[0] = f"on the first of {world_size()} processes, each with its share: {lines[0]}"
    for line in lines:
        say(line, sys.stderr)


def streaming_lines(
    plan: StreamPlan, rate: float, flops: float | None, item: str, unit: str, times: int = 1
) -> list[str]:
    """`rate`: bytes per second of the disk; `flops`: operations per second of matrix products, None if not known."""
    blocks, stay = len(plan.sizes.blocks), len(plan.resident)
    head = "the head" if plan.head_stays else "not the head"
    lines = [
        f"memory {file_size(plan.budget)}: {stay} of {blocks} blocks and {head} stay in memory; each pass reads "
        f"{file_size(plan.bytes_per_pass)} from disk for {plan.items} of {plan.work.wanted} {item} at a time"
    ]
    if plan.cache_on_disk:
        cache = plan.items * plan.work.cache_each
        lines.append(f"{file_size(cache)} of that are keys and values, which have no room and are in a file meanwhile")
    seconds = plan.seconds_per_pass(rate, flops)
    reading = plan.bytes_per_pass / rate
    bound = "by reading" if seconds <= reading else "by computing"
    number = plan.passes * times
    rest = f", {number} passes {duration(seconds * number)}" if number > 1 else ""
    lines.append(f"the disk gives {file_size(rate)}/s: about {duration(seconds)} {unit}, bound {bound}{rest}")
    if plan.sizes.packed and plan.bytes_per_pass:
        lines.append(
            "not counted: blocks that do not stay are packed anew in each pass, which may take longer than reading; "
            "--dtype fp32 does without"
        )
    if plan.bytes_per_pass and seconds <= reading:
        lines.append(f"faster: {_faster(plan, item)}")
    return lines


def _faster(plan: StreamPlan, item: str) -> str:
    sizes, left = plan.sizes, len(plan.sizes.blocks) - len(plan.resident)
    missing = left * (sizes.packed or sizes.buffer) + (0 if plan.head_stays else sizes.head)
    ways = [f"more memory ({file_size(plan.budget + missing)} would read no block again)"]
    if plan.items == plan.work.wanted:
        ways.append(f"more {item} at once, for the same reading")
    if item == "texts" and not sizes.packed and 2 * missing <= sum(sizes.blocks):
        ways.append("--dtype int8, of which about twice as many blocks stay")
    return "; or ".join(ways)


def print_checkpoint_plan(path: str, generate: bool, memory: int | None, as_json: bool) -> None:
    """Print how a checkpoint is streamed, with the rates of this disk and processor, which are measured first."""
    import torch

    from castalia.checkpoint.restore import architecture
    from castalia.cli.opening import open_and_tell
    from castalia.config.schema import RunConfig
    from castalia.streaming.open_streamed import open_streamed
    from castalia.streaming.stream_units import units_of
    from castalia.train.hardware import present_flops

    checkpoint = open_and_tell(path)
    model = architecture(checkpoint)
    units = units_of(checkpoint, model, torch.float32)
    plans = streaming_plans(units.sizes(), model, checkpoint.config or RunConfig(), generate, memory)
    streamed = open_streamed(checkpoint, model, units, plans[0])
    rate, flops = streamed.reader.measure(), present_flops(torch.float32)
    streamed.reader.close()
    _print_plans(plans, [rate], flops, generate, as_json)


def print_model_plan(config: RunConfig, generate: bool, memory: int | None, as_json: bool) -> None:
    """Print how a model of 16-bit weights would be streamed from disks of `DISK_RATES`, computed in fp32."""
    from castalia.plan.stream_plan import sizes_of_model

    assert config.model is not None
    plans = streaming_plans(sizes_of_model(config.model, 2, 4), config.model, config, generate, memory)
    _print_plans(plans, DISK_RATES, None, generate, as_json)


def streaming_plans(
    sizes: StreamedSizes, model: ModelConfig, config: RunConfig, generate: bool, memory: int | None
) -> list[StreamPlan]:
    """Plans for more and more texts, or windows of the run's sequence, computed in fp32.

    Texts have as many tokens as the config asks for, after prompts of `PROMPT_TOKENS`. A micro-batch is one window.
    """
    from castalia.machine import free_memory
    from castalia.plan.stream_plan import SHARE, EvaluationShape, evaluation_work, generation_work, plan_stream

    length = min(config.data.seq_length, model.max_positions or config.data.seq_length)
    tokens, documents = config.generate.max_tokens or TEXT_TOKENS, config.data.mask_documents
    works = [
        generation_work(model, PROMPT_TOKENS, tokens, wanted, 4)
        if generate
        else evaluation_work(model, EvaluationShape(length, 1, wanted, documents), 4)
        for wanted in ITEMS
    ]
    return [plan_stream(sizes, work, memory or int(SHARE * free_memory())) for work in works]


def _print_plans(
    plans: Sequence[StreamPlan], rates: Sequence[float], flops: float | None, generate: bool, as_json: bool
) -> None:
    rows = [_plan_row(plan, rates, flops) for plan in plans]
    if as_json:
        print(to_json({"disk_bytes_per_second": rates, "flops_per_second": flops, "plans": rows}, indent=1))
        return
    sizes = plans[0].sizes
    print(f"{len(sizes.blocks)} blocks of {file_size(sizes.buffer)}, head {file_size(sizes.head)}")
    if flops:
        print(f"disk {file_size(rates[0])}/s, matrix products {flops / 1e9:.3g} GFLOP/s, measured now on this machine")
    else:
        print("times are those of reading alone")
    shown = [
        [f"{row['wanted']:,}", f"{row['at_once']:,}", f"{row['resident_blocks']}", file_size(row["bytes_per_pass"])]
        + [duration(seconds) for seconds in row["seconds_per_pass"]]
        for row in rows
    ]
    pass_of = "a token of each" if generate else "a pass"
    header = ["texts" if generate else "windows", "at once", "blocks that stay", "read in a pass"]
    print_table(
        f"memory {file_size(plans[0].budget)}", header + [f"{pass_of} at {file_size(rate)}/s" for rate in rates], shown
    )


def _plan_row(plan: StreamPlan, rates: Sequence[float], flops: float | None) -> dict[str, Any]:
    seconds = [plan.seconds_per_pass(rate, flops) for rate in rates]
    return {
        "wanted": plan.work.wanted,
        "at_once": plan.items,
        "resident_blocks": len(plan.resident),
        "head_stays": plan.head_stays,
        "cache_on_disk": plan.cache_on_disk,
        "bytes_per_pass": plan.bytes_per_pass,
        "seconds_per_pass": seconds,
    }


@contextmanager
def blocks_watched(model: StreamedTransformer, passes: int) -> Iterator[None]:
    """A bar over the blocks of so many passes."""
    from castalia.parallel.rendezvous import is_main

    with progress(passes * len(model.blocks), shown=is_main()) as model.advance:
        yield


@contextmanager
def block_progress(model: StreamedTransformer | None, passes: int | None = None) -> Iterator[None]:
    """A bar over the blocks of so many passes, where it does not come between pieces of text on the same terminal."""
    if model is None:
        yield
        return
    from castalia.parallel.rendezvous import is_main

    total = passes and passes * len(model.blocks)
    try:
        with progress(total, shown=is_main() and not sys.stdout.isatty()) as model.advance:
            yield
    finally:
        model.reader.close()  # else the process, if it is interrupted, ends only when the next blocks are there
