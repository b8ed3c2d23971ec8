"""What a layout costs each rank: bytes in memory against the plan's, bytes on the wire, waiting in pipelines.

python benchmarks/parallel.py [--quick] [--trace FOLDER] [--json FILE]

Memory is measured in one training step on gloo workers; traffic by counting what collectives are given; waiting by a
clock that runs each schedule's own order of actions with a forward pass of 1 and a backward pass of 2. How long
collectives run, and for what share of that the rank computes meanwhile, is told by torch's profiler, whose trace of
each rank `--trace` keeps, for Perfetto or chrome://tracing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import results

Intervals = list[tuple[float, float]]

LAYOUTS = {
    "dp2 zero0": (2, []),
    "dp2 zero1": (2, ["parallel.zero=1"]),
    "dp2 zero2": (2, ["parallel.zero=2"]),
    "dp2 zero3": (2, ["parallel.zero=3"]),
    "tp2": (2, ["parallel.tp=2"]),
    "pp2": (2, ["parallel.pp=2"]),
    "tp2 pp2": (4, ["parallel.tp=2", "parallel.pp=2"]),
}
MODEL = ["model.num_layers=8", "model.hidden_size=256", "model.num_heads=8", "model.vocab_multiple=256"]
RUN = ["data.seq_length=256", "tokenizer.kind=bytes", "precision.compute=fp32", "train.steps=6", "train.batch_size=16"]
RUN += ["train.accumulation=4", "log.peak_tflops=0.1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two layouts instead of all")
    parser.add_argument("--trace", type=Path, metavar="FOLDER", help="keep the trace of each layout's ranks there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    results.option(parser)
    options = parser.parse_args()
    if options.worker:
        measure_step(json.loads(options.worker), options.trace)
        return
    print("| pipeline | ranks | micro-batches | waiting / working | plan |\n|---|---|---|---|---|")
    for pp, count in ((4, 8), (4, 32), (8, 64)):
        for name in ("gpipe", "1f1b", "interleaved", "zero-bubble"):
            waiting, planned = simulated_bubble(name, pp, count), planned_bubble(name, pp, count)
            print(f"| {name} | {pp} | {count} | {waiting:.3f} | {planned:.3f} |")
    columns = "measured MiB | planned MiB | ratio | sent MiB a step | collectives, ms | computing meanwhile"
    print(f"\n| layout | rank | {columns} |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder))
        for name in list(LAYOUTS)[:: 4 if options.quick else 1]:
            measure(name, Path(folder), options.trace and options.trace / name.replace(" ", "-"))


def planned_bubble(name: str, pp: int, count: int) -> float:
    from castalia.config.layout_rules import stages_per_rank
    from castalia.config.schema import ParallelConfig
    from castalia.plan.layout import Layout, bubble

    chunks = stages_per_rank(ParallelConfig(pp=pp, pipeline=name))  # type: ignore[arg-type]
    return bubble(Layout(pp=pp, accumulation=count, pipeline=name, stages_per_rank=chunks))  # type: ignore[arg-type]


def simulated_bubble(name: str, pp: int, count: int) -> float:
    """Waiting over working of the ranks; communication takes no time."""
    order, num_stages = actions(name, pp, count)
    cost = {"F": 1, "B": 2, "I": 1, "W": 1}
    done: dict[tuple[str, int, int], int] = {}
    clock, at = [0] * pp, [0] * pp
    work = [sum(cost[kind] for kind, _, _ in mine) for mine in order]
    moved = True
    while moved:
        moved = False
        for rank, mine in enumerate(order):
            while at[rank] < len(mine):
                kind, stage, micro = mine[at[rank]]
                before = []
                if kind == "F" and stage > 0:
                    before = [("F", stage - 1, micro)]
                if kind in "BI":
                    before = [("F", stage, micro)] + [("B", stage + 1, micro)] * (stage + 1 < num_stages)
                if any(action not in done for action in before):
                    break
                clock[rank] = max([clock[rank], *(done[action] for action in before)]) + cost[kind]
                done["B" if kind == "I" else kind, stage, micro] = clock[rank]
                at[rank] += 1
                moved = True
    assert all(at[rank] == len(mine) for rank, mine in enumerate(order)), "the order never ends"
    return max(clock) / max(work) - 1


def actions(name: str, pp: int, count: int) -> tuple[list[list[tuple[str, int, int]]], int]:
    """Each rank's actions in order (kind, stage, micro-batch), and the number of stages."""
    if name in ("gpipe", "1f1b"):
        order = []
        for rank in range(pp):
            ahead = count if name == "gpipe" else min(count, pp - rank)
            mine = [("F", rank, i) for i in range(ahead)]
            for i in range(count):
                mine.append(("B", rank, i))
                if i + ahead < count:
                    mine.append(("F", rank, i + ahead))
            order.append(mine)
        return order, pp
    from torch import nn

    from castalia.parallel.pipeline import SCHEDULES
    from castalia.plan.layout import stages_of_rank

    stages = [
        SimpleNamespace(
            stage_index=i, num_stages=2 * pp, group_size=pp, group_rank=0, group=None, has_backward=False,
            is_first=i == 0, is_last=i == 2 * pp - 1, stage_index_to_group_rank={}, submod=nn.Identity(),
        )
        for i in stages_of_rank(name, pp, 2, 0)
    ]  # fmt: skip
    theirs = SCHEDULES[name](stages, count, loss_fn=lambda *_: None).pipeline_order
    kinds = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    every = [[a for a in theirs[rank] if a is not None and a.computation_type.name in kinds] for rank in range(pp)]
    order = [[(kinds[a.computation_type.name], a.stage_index, a.microbatch_index) for a in mine] for mine in every]
    return order, 2 * pp


def write_corpus(folder: Path) -> None:
    import numpy as np

    from castalia.data.dataset_writer import DatasetWriter

    with DatasetWriter(folder / "text", "uint16") as text:
        text.add(np.random.default_rng(0).integers(0, 256, 100_000))


def measure(name: str, folder: Path, trace: Path | None) -> None:
    world, layout = LAYOUTS[name]
    words = [*MODEL, *RUN, *layout, f'data.train=[{{"path": "{folder / "text"}"}}]']
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, __file__, "--worker", json.dumps(words), *(["--trace", str(trace)] if trace else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    for line in sorted(line for line in done.stdout.splitlines() if line.startswith("{")):
        found = json.loads(line)
        ratio = found["measured"] / found["planned"]
        sizes = f"{found['measured'] / 2**20:.1f} | {found['planned'] / 2**20:.1f} | {ratio:.2f}"
        times = f"{1e3 * found['collectives']:.0f} | {found['hidden']:.0%}" if found["collectives"] else "0 |"
        print(f"| {name} | {found['rank']} | {sizes} | {found['sent'] / 2**20:.1f} | {times} |", flush=True)
        results.record(f"{name}, rank {found['rank']}: a step", [found["seconds"]])


def union(intervals: Iterable[tuple[float, float]]) -> Intervals:
    """The same times as intervals that do not meet, in order."""
    joined: Intervals = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def common(first: Intervals, second: Intervals) -> float:
    """The time that lies in both."""
    return sum(max(0.0, min(b, d) - max(a, c)) for a, b in first for c, d in second)


def overlap(events: Iterable[Any]) -> tuple[float, float]:
    """Seconds in which a collective runs, and the share of them in which the rank computes."""

    def times(some: Iterable[Any]) -> Intervals:
        return union((event.time_range.start / 1e6, event.time_range.end / 1e6) for event in some)

    moves = [event for event in events if event.name.startswith("gloo:")]
    theirs = {event.thread for event in moves}  # threads in which collectives add up
    moving = times(moves)
    working = times(event for event in events if event.name.startswith("aten::") and event.thread not in theirs)
    seconds = sum(end - begin for begin, end in moving)
    return seconds, common(moving, working) / seconds if seconds else 0.0


def measure_step(words: list[str], trace: Path | None) -> None:
    """One rank: a line of JSON with its peak of tensor bytes in a step, and what it gave to collectives."""
    import time

    import torch
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    from castalia.config.load import load_config
    from castalia.parallel.process_group import process_group
    from castalia.plan.memory import Compute, memory_by_stage, moments_of
    from castalia.plan.run_plan import layout_of
    from castalia.train.setup import start
    from castalia.train.step_memory import PeakMemory

    class Sent(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN202
            moves = func.namespace in ("c10d", "_c10d_functional")
            if moves and not any(word in str(func) for word in ("wait_tensor", "wrap_tensor")):
                tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
                self.bytes += max((t.nbytes for t in tensors), default=0)
            return func(*args, **(kwargs or {}))

    with process_group("cpu"):
        config = load_config([], words)
        session = start(config)
        executor = session.executor
        for step in range(2):
            session.step(step, session.batch(step))
        layout, _ = layout_of(config, executor.world)
        held = [executor.part(p).local.nbytes for p in executor.parameters.values()]
        held += [executor.part(t).local.nbytes for state in session.optimizer.state.values() for t in state.values()]
        with PeakMemory(session.device) as peak:
            session.step(2, session.batch(2))
        with Sent() as sent:
            session.step(3, session.batch(3))
        begin = time.perf_counter()
        session.step(4, session.batch(4))
        seconds = time.perf_counter() - begin
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            session.step(5, session.batch(5))
        moving, hidden = overlap(profiler.events())
        if trace:
            trace.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(trace / f"rank{executor.rank}.json.gz"))
        compute = Compute(session.config.precision.compute, "cpu", moments_of(config.optimizer))
        rank = dist.get_rank() * layout.pp // executor.world
        planned = memory_by_stage(session.config.model, layout, config.data.seq_length, compute)[rank]
        found = {
            "rank": executor.rank,
            "measured": sum(held) + peak.bytes,
            "planned": planned.total,
            "sent": sent.bytes,
            "seconds": seconds,
            "collectives": moving,
            "hidden": hidden,
        }
        os.write(1, (json.dumps(found) + "\n").encode())  # at once: other ranks write to the same pipe


if __name__ == "__main__":
    main()
