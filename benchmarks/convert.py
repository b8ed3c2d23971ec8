"""Conversions against `cp` and `sync` of the same bytes on the same disk, and against transformers.

    python benchmarks/convert.py [--hidden 1024] [--layers 8] [--rounds 3] [--folder .] [--quick]
    python benchmarks/convert.py --source CHECKPOINT [--layout tp=4,pp=2,dp=2,zero=1]    # of any format

Every conversion runs in a process of its own, whose anonymous memory is sampled; it may use two of the largest tensors
and 400 MB. Times include the wait until everything is on disk. Both sides are treated alike: before each, what is to be
read is read into the page cache, and as many bytes are written and deleted, so that the memory is at hand.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import results

from castalia.checkpoint.formats.native.save import CheckpointSaver
from castalia.config.schema import ModelConfig

ALLOWED_BYTES = 400 << 20
FORMATS = ("native", "hf", "neox")


def make_source(folder: Path, model: ModelConfig) -> None:
    """A native checkpoint of random tensors with moments."""
    import torch

    from castalia.checkpoint.tensors import Progress
    from castalia.config.schema import RunConfig, TokenizerConfig
    from castalia.config.tensor_table import tensor_shapes

    weights = {name: torch.randn(shape) * 0.02 for name, shape in tensor_shapes(model).items()}
    moments = {
        name: {"exp_avg": weight * 1e-3, "exp_avg_sq": weight.square(), "step": 1} for name, weight in weights.items()
    }
    with CheckpointSaver(folder) as writer:
        config = RunConfig(model=model, tokenizer=TokenizerConfig(kind="bytes"))
        writer.save(weights, moments, Progress(step=1), config)


def convert(
    source: Path, target: Path, form: str, layout: str | None = None, gguf_type: Literal["f16", "q8_0"] | None = None
) -> None:
    from castalia.checkpoint import convert
    from castalia.checkpoint.file_plan import WriteOptions
    from castalia.checkpoint.formats import TARGETS
    from castalia.checkpoint.opener import open_checkpoint
    from castalia.cli.convert import parse_layout
    from castalia.machine import keep_freed_memory

    keep_freed_memory()  # as the command does
    checkpoint = convert.prepare(open_checkpoint(source))
    chosen, options = TARGETS[form], WriteOptions(parse_layout(layout), gguf_type=gguf_type)
    plan = convert.plan_files(form, checkpoint, options)
    inside = chosen.step_folder.format(step=checkpoint.progress.step) if chosen.nested else ""
    mark = convert.identity(checkpoint, options, plan)
    convert.write(plan, target, mark, lambda count: None, inside=inside)


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", "-f", target], check=True)


def resave(source: Path, target: Path) -> None:
    """What people do without a converter; weights alone."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(source).save_pretrained(target)
    subprocess.run(["sync", "-f", target], check=True)


def child(work: Callable[..., None], arguments: tuple, connection) -> None:
    """Say when all is imported, run, and send the seconds."""
    import torch

    import castalia.checkpoint.convert
    import castalia.checkpoint.formats.huggingface.write
    import castalia.checkpoint.formats.native.write
    import castalia.checkpoint.formats.neox.write
    import castalia.cli.convert
    import castalia.train.hardware  # noqa: F401

    if work is resave:
        import transformers  # noqa: F401
        from transformers import GPTNeoXForCausalLM  # noqa: F401
    torch.set_num_threads(1)
    connection.send("ready")
    start = time.perf_counter()
    work(*arguments)
    connection.send(time.perf_counter() - start)


def anonymous_bytes(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def timed(work: Callable[..., None], *arguments: object) -> tuple[float, int]:
    """Seconds, and the growth of anonymous memory."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=child, args=(work, arguments, there))
    process.start()
    there.close()
    try:
        here.recv()
        before = peak = anonymous_bytes(process.pid)
        while not here.poll(0.005):
            peak = max(peak, anonymous_bytes(process.pid))
        return here.recv(), peak - before
    finally:
        process.join()


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def settle(read: Path, written: Path, scratch: Path) -> None:
    """Bring `read` into the page cache; write as many bytes as `written` has, and give their memory back."""
    for path in read.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass
    copy(written, scratch / "settled")
    shutil.rmtree(scratch / "settled")


def race(name: str, work: Callable[..., None], source: Path, arguments: tuple, rounds: int, scratch: Path) -> Path:
    """One row: the work and a copy of its result take turns. Returns the result's folder."""
    ratios, speeds, peaks, taken = [], [], [], []
    result = scratch / name.replace(" ", "-")
    for _ in range(rounds):
        written = result if result.exists() else source
        settle(source, written, scratch)
        shutil.rmtree(result, ignore_errors=True)
        seconds, peak = timed(work, source, result, *arguments)
        settle(result, result, scratch)
        start = time.perf_counter()
        copy(result, scratch / "copy")
        copied = time.perf_counter() - start
        shutil.rmtree(scratch / "copy")
        ratios.append(copied / seconds)
        taken.append(seconds)
        speeds.append(size_of(result) / seconds / 1e6)
        peaks.append(peak)
    cells = [name, f"{size_of(result) / 1e6:.0f}", f"{statistics.median(speeds):.0f}"]
    cells += [f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}-{max(ratios):.2f}", f"{max(peaks) / 1e6:.0f}"]
    print(f"| {' | '.join(cells)} |", flush=True)
    results.record(name, taken)
    return result


def show_head(largest: int, rounds: int) -> None:
    """`largest`: bytes of the largest tensor."""
    print(f"{rounds} rounds, {os.cpu_count()} cores; memory: anonymous, above that at start;", end=" ")
    print(f"allowed are {(2 * largest + ALLOWED_BYTES) / 1e6:.0f} MB\n")
    print("| from, to | MB | MB/s | speed / cp+sync | range | memory MB |")
    print("|---|---|---|---|---|---|")


def between_formats(args: argparse.Namespace, scratch: Path) -> None:
    """A made checkpoint to and from each format, and through transformers."""
    model = ModelConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_heads=args.hidden // 32,
        vocab_size=args.vocab,
        rotary_pct=0.25,
        parallel_residual=True,
        max_positions=256,
    )
    make_source(scratch / "source", model)
    print(f"native checkpoint with optimizer state, {size_of(scratch / 'source') / 1e6:.0f} MB;", end=" ")
    show_head(4 * max(args.vocab * args.hidden, 4 * args.hidden**2), args.rounds)
    results = {}
    for form in FORMATS:
        results[form] = race(f"native to {form}", convert, scratch / "source", (form,), args.rounds, scratch)
    for form in FORMATS[1:]:
        race(f"{form} to native", convert, results[form], ("native",), args.rounds, scratch)
    race("hf in transformers", resave, results["hf"], (), args.rounds, scratch)


def from_source(args: argparse.Namespace, scratch: Path) -> None:
    """The checkpoint at hand to each format; to NeoX's on other ranks."""
    from castalia.checkpoint.opener import open_checkpoint
    from castalia.checkpoint.restore import describe

    checkpoint = open_checkpoint(args.source)
    print(f"{describe(checkpoint)}, {size_of(args.source) / 1e6:.0f} MB;", end=" ")
    show_head(max(4 * math.prod(ref.shape) for ref in checkpoint.model.values()), args.rounds)
    for form in FORMATS:
        arguments, words = ((form, args.layout), f" {args.layout}") if form == "neox" else ((form,), "")
        shutil.rmtree(race(f"to {form}{words}", convert, args.source, arguments, args.rounds, scratch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a checkpoint of any format, instead of a made one")
    parser.add_argument("--layout", default="tp=4,pp=2,dp=2,zero=1", help="of NeoX's files made from --source")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=".", help="on the disk to be measured")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round: does it run?")
    results.option(parser)
    args = parser.parse_args()
    if args.quick:
        args.hidden, args.layers, args.vocab, args.rounds = 64, 2, 512, 1
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        (from_source if args.source else between_formats)(args, Path(name))


if __name__ == "__main__":
    main()
