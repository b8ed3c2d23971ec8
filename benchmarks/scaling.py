"""How cost grows: training steps, preparation, index and conversion at several sizes, beside what theory says.

    python benchmarks/scaling.py [--plot FILE.png] [--only NAME] [--quick]

Theory: for a step the model's operations (6N + causal attention) and the bytes of `castalia plan`; for the rest the
size itself. `growth` is the cost over that of the smallest size, beside the same of the theory; what grows faster than
1.25 times its theory is named at the end. Small sizes have fixed costs, so growth below theory is to be expected.
Times are medians of three, but of texts beyond 100 MB of one run; steps are in bf16 where the CPU multiplies it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count as count_up
from pathlib import Path
from typing import NamedTuple

import numpy as np
import results
import torch
from convert import convert, make_source, size_of, timed
from data import SEED, SEQ_LENGTH, peak_bytes
from prepare import KJV, ours, write_text
from train import Work
from train import ours as training

from castalia.config.schema import ModelConfig, TokenizerConfig
from castalia.data.sample_index import build_packed
from castalia.data.tokenizer import train_bpe
from castalia.plan.count import count
from castalia.plan.flops import training_flops
from castalia.plan.layout import Layout
from castalia.plan.memory import Compute, memory_by_stage
from castalia.train.hardware import choose_dtype, name_of
from castalia.train.step_memory import PeakMemory

ALLOWED = 1.25
BASE = {"seq": 512, "batch": 2, "vocabulary": 8192, "depth": 4, "width": 128}
SWEEPS: dict[str, tuple[list[int], dict[str, int]]] = {  # sizes, and what else differs from the base
    "seq": ([512, 1024, 2048, 4096, 8192, 16384], {"batch": 1, "depth": 2}),
    "vocabulary": ([4096, 16384, 65536, 262144], {}),
    "depth": ([2, 4, 8, 16, 32], {}),
    "width": ([64, 128, 256, 512, 1024], {}),
    "batch": ([1, 2, 4, 8, 16, 32], {}),
}


class Point(NamedTuple):
    """One size of a sweep. Memory is 0 where it was not measured."""

    size: float
    seconds: float
    theory: float  # of the time, in any unit
    memory: float = 0
    memory_theory: float = 0


def steps(name: str, sizes: list[int], others: dict[str, int]) -> Iterator[Point]:
    precision = name_of(choose_dtype("auto", torch.device("cpu")))
    for size in sizes:
        chosen = BASE | others | {name: size}
        model = ModelConfig(
            num_layers=chosen["depth"],
            hidden_size=chosen["width"],
            num_heads=max(1, chosen["width"] // 64),
            vocab_size=chosen["vocabulary"],
            max_positions=chosen["seq"],
            rotary_pct=0.25,
            parallel_residual=True,
        )
        yield step_point(size, Work(model, chosen["batch"], chosen["seq"], precision, "same"))
        gc.collect()


def step_point(size: int, work: Work) -> Point:
    step, layout = partial(training(work), 0), Layout(micro_batch=work.batch)
    seconds = median_seconds(step)
    with PeakMemory(torch.device("cpu")) as peak:
        step()
    compute = Compute(work.precision, "cpu")
    planned = memory_by_stage(work.model, layout, work.seq, compute)[0].total
    operations = work.batch * work.seq * training_flops(work.model, work.seq)
    state = 12 * count(work.model).total  # masters and AdamW's moments
    return Point(size, seconds, operations, state + peak.bytes, planned)


def median_seconds(work: Callable[[], object], rounds: int = 3) -> float:
    taken = []
    for number in range(1 + rounds):
        start = time.perf_counter()
        work()
        if number:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def preparations(megabytes: list[float]) -> Iterator[Point]:
    """The Bible again and again; sizes are those of the text."""
    lines = KJV.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_bpe(iter(lines[:1_000_000].splitlines()), 8_000).save(folder / "tokenizer")
        tokenizer = TokenizerConfig(path=str(folder / "tokenizer"))
        for wanted in megabytes:
            texts = (lines[first : first + 4000] for _ in count_up() for first in range(0, len(lines), 4000))
            written = write_text(folder / "text.jsonl", texts, wanted)
            work = partial(ours, folder / "text.jsonl", folder / "out", tokenizer, None)
            yield Point(written, median_seconds(work, 3 if wanted <= 100 else 1), written)


def indexes(documents: list[int]) -> Iterator[Point]:
    for number in documents:
        sizes = np.random.default_rng(0).integers(1, 2000, number).astype(np.int32)
        work = partial(build_packed, sizes, np.arange(number, dtype=np.int32), None, SEQ_LENGTH, SEED)
        index = work()
        total = sum(array.nbytes for array in (index.documents, index.bounds, index.order))
        yield Point(number, median_seconds(work), number, peak_bytes(work), total)


def conversions(widths: list[int]) -> Iterator[Point]:
    """Native with optimizer state to NeoX; sizes are those of the result."""
    for width in widths:
        model = ModelConfig(
            num_layers=6, hidden_size=width, num_heads=width // 32, vocab_size=8192, max_positions=256,
            rotary_pct=0.25, parallel_residual=True,
        )  # fmt: skip
        with tempfile.TemporaryDirectory(dir=".") as name:
            folder = Path(name)
            make_source(folder / "source", model)
            seconds, memory = timed(convert, folder / "source", folder / "result", "neox")
            size = size_of(folder / "result") / 1e6
        yield Point(size, seconds, size, memory, 4 * max(8192 * width, 4 * width**2))


def sweeps(quick: bool) -> dict[str, Callable[[], Iterator[Point]]]:
    """By the name of what grows."""
    few = 2 if quick else None
    found = {name: partial(steps, name, sizes[:few], others) for name, (sizes, others) in SWEEPS.items()}
    found["MB prepared"] = partial(preparations, [0.2, 0.4] if quick else [10, 100, 1000, 10000])
    found["documents indexed"] = partial(indexes, [1000, 2000] if quick else [10**4, 10**5, 10**6, 10**7])
    found["MB converted"] = partial(conversions, [64] if quick else [192, 512, 1024, 2816])
    return found


def show(name: str, points: list[Point]) -> list[str]:
    """A table; returns what grows too fast. The memory of a conversion is compared with its largest tensor's."""
    print(f"\n| {name} | ms | growth | theory | memory MiB | theory MiB |\n|---|---|---|---|---|---|")
    first, last = points[0], points[-1]
    for point in points:
        growth = f"{point.seconds / first.seconds:.2f}", f"{point.theory / first.theory:.2f}"
        memory = [f"{size / 2**20:.1f}" if size else "" for size in (point.memory, point.memory_theory)]
        results.record(f"{name}, {point.size:,.6g}", [point.seconds])
        print(f"| {point.size:,.6g} | {point.seconds * 1e3:.1f} | {' | '.join([*growth, *memory])} |", flush=True)
    faults = []
    if last.seconds / first.seconds > ALLOWED * last.theory / first.theory:
        faults.append(f"{name}: time")
    if last.memory and last.memory / first.memory > ALLOWED * last.memory_theory / first.memory_theory:
        faults.append(f"{name}: memory")
    return faults


def draw(curves: dict[str, list[Point]], path: Path) -> None:
    """Seconds of each sweep on logarithmic axes, and theory drawn through the largest size."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = -(-len(curves) // 4)
    figure, axes = pyplot.subplots(rows, 4, figsize=(16, 3.5 * rows), squeeze=False)
    for axis, (name, points) in zip(axes.flat, curves.items(), strict=False):
        last = points[-1]
        axis.loglog([p.size for p in points], [p.seconds for p in points], "o-", label="measured")
        axis.loglog(
            [p.size for p in points], [p.theory / last.theory * last.seconds for p in points], "--", label="theory"
        )
        axis.set(xlabel=name, ylabel="seconds")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="draw the curves into this file")
    parser.add_argument("--only", help="one of the tables, by the name of what grows")
    parser.add_argument("--quick", action="store_true", help="two small sizes of each: does it run?")
    results.option(parser)
    args = parser.parse_args()
    curves, faults = {}, []
    for name, sweep in sweeps(args.quick).items():
        if args.only in (None, name):
            curves[name] = list(sweep())
            faults += show(name, curves[name])
    print(f"\ngrows faster than theory: {', '.join(faults) or 'nothing'}")
    if args.plot:
        draw(curves, args.plot)


if __name__ == "__main__":
    main()
