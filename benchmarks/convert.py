"""Conversions against `cp` and `sync` of the same bytes on the same disk, and against transformers.

    python benchmarks/convert.py [--hidden 512] [--layers 4] [--rounds 3] [--folder .] [--quick]

Every conversion runs in a process of its own, whose anonymous memory is sampled; it may use two of the largest tensors
and 400 MB. The source is in the page cache for all. Times include the wait until everything is on disk.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from castalia.config.schema import Model

ALLOWED_BYTES = 400 << 20
FORMATS = ("native", "hf", "neox")


def make_source(folder: Path, model: Model) -> None:
    """A native checkpoint of random tensors with moments."""
    import torch

    from castalia.checkpoint.formats.native import Writer
    from castalia.checkpoint.tensors import Progress
    from castalia.config.schema import RunConfig
    from castalia.plan.count import tensor_shapes

    weights = {name: torch.randn(shape) * 0.02 for name, shape in tensor_shapes(model).items()}
    moments = {
        name: {"exp_avg": weight * 1e-3, "exp_avg_sq": weight.square(), "step": 1} for name, weight in weights.items()
    }
    with Writer(folder) as writer:
        writer.save(weights, moments, Progress(step=1), RunConfig(model=model))


def convert(source: Path, target: Path, form: str) -> None:
    from castalia.checkpoint import convert
    from castalia.checkpoint.formats import open_checkpoint
    from castalia.checkpoint.writing import WriteOptions

    checkpoint = convert.prepare(open_checkpoint(source))
    chosen, options = convert.TARGETS[form], WriteOptions()
    plan = chosen.plan(checkpoint, options)
    inside = chosen.step_folder.format(step=1) if chosen.nested else ""
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
    """Run, and send the seconds and the growth of anonymous memory. Imports are done before."""
    import torch

    import castalia.checkpoint.convert
    import castalia.checkpoint.formats.huggingface_write
    import castalia.checkpoint.formats.native_write  # noqa: F401

    if work is resave:
        import transformers  # noqa: F401
        from transformers import GPTNeoXForCausalLM  # noqa: F401
    torch.set_num_threads(1)
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    work(*arguments)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    connection.send((seconds, max(0, peak - before)))


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def timed(work: Callable[..., None], *arguments: object) -> tuple[float, int]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=child, args=(work, arguments, there))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def race(name: str, work: Callable[..., None], source: Path, arguments: tuple, rounds: int, scratch: Path) -> Path:
    """One row: the work and a copy of its result take turns. Returns the result's folder."""
    ratios, speeds, peaks = [], [], []
    result = scratch / name.replace(" ", "-")
    for _ in range(rounds):
        shutil.rmtree(result, ignore_errors=True)
        seconds, peak = timed(work, source, result, *arguments)
        start = time.perf_counter()
        copy(result, scratch / "copy")
        copied = time.perf_counter() - start
        shutil.rmtree(scratch / "copy")
        ratios.append(copied / seconds)
        speeds.append(size_of(result) / seconds / 1e6)
        peaks.append(peak)
    cells = [name, f"{size_of(result) / 1e6:.0f}", f"{statistics.median(speeds):.0f}"]
    cells += [f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}-{max(ratios):.2f}", f"{max(peaks) / 1e6:.0f}"]
    print(f"| {' | '.join(cells)} |", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=".", help="on the disk to be measured")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.hidden, args.layers, args.vocab, args.rounds = 64, 2, 512, 1

    model = Model(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_heads=args.hidden // 32,
        vocab_size=args.vocab,
        rotary_pct=0.25,
        parallel_residual=True,
        max_positions=256,
    )
    largest = 4 * max(args.vocab * args.hidden, 4 * args.hidden**2)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        scratch = Path(name)
        make_source(scratch / "source", model)
        size = size_of(scratch / "source") / 1e6
        print(f"native checkpoint with optimizer state, {size:.0f} MB, {args.rounds} rounds, {os.cpu_count()} cores;")
        print(f"memory: anonymous, above that at start; allowed are {(2 * largest + ALLOWED_BYTES) / 1e6:.0f} MB\n")
        print("| from, to | MB | MB/s | speed / cp+sync | range | memory MB |")
        print("|---|---|---|---|---|---|")
        results = {}
        for form in FORMATS:
            work = (convert, scratch / "source", (form,))
            results[form] = race(f"native to {form}", *work, args.rounds, scratch)
        for form in FORMATS[1:]:
            race(f"{form} to native", convert, results[form], ("native",), args.rounds, scratch)
        race("hf in transformers", resave, results["hf"], (), args.rounds, scratch)


if __name__ == "__main__":
    main()
