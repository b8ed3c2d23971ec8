"""Checkpoints side by side: ours, torch's distributed checkpoints (DCP), `torch.save`; beside them memory and disk.

    python benchmarks/checkpoint.py [--megabytes 600] [--rounds 5] [--ranks 2] [--folder .] [--quick]

All sides take turns with the same tensors: a model's fp32 parameters and AdamW's two moments. A save has ended when
everything is on disk: where a side does not call `fsync`, this program does. What is read lies in the page cache, and
goes into tensors that are there already; it must be what was saved. Resharding: `--ranks` processes load a share each
of the rows of every tensor from what one process saved, and save them together, which one process loads. The floors:
one copy in memory for the time in which an asynchronous save holds up training; writing and reading one file of the
same size for the others. `torch.save` has no checkpoint of several processes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import results
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Rows

from castalia.checkpoint.formats.native.save import CheckpointSaver
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import load_optimizer, load_shards, optimizer_state
from castalia.checkpoint.tensors import Progress, Shard
from castalia.config.schema import ModelConfig, OptimizerConfig, RunConfig
from castalia.config.tensor_table import tensor_shapes
from castalia.machine import keep_freed_memory
from castalia.plan.count import count
from castalia.train.optimizer import make_optimizer

SIDES = ("castalia", "DCP", "torch.save")
SHARED = SIDES[:2]  # that several processes save together
TARGETS = {"blocked": "1.2x", "save": "0.8", "load": "0.7", "reshard": "0.7", "save together": "", "merge": ""}


class State:
    """Parameters and their optimizer: all rows, or this rank's."""

    def __init__(self, model: ModelConfig, rank: int | None = None, ranks: int = 1) -> None:
        self.model, self.rank, self.ranks = model, rank, ranks
        shapes = tensor_shapes(model)
        if rank is not None:
            shapes = {name: (rows // ranks, *rest) for name, (rows, *rest) in shapes.items()}
        self.parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
        self.optimizer = make_optimizer(self.parameters, OptimizerConfig())

    @property
    def moments(self) -> dict[str, dict[str, torch.Tensor]]:
        return optimizer_state(self.optimizer, self.parameters)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is large, by name."""
        found = {name: parameter.detach() for name, parameter in self.parameters.items()}
        for name, state in self.moments.items():
            found |= {f"{name}.{kind}": tensor for kind, tensor in state.items() if kind != "step"}
        return found

    def placed(self) -> dict[str, Any]:
        """The same as DCP takes them: DTensors where each rank has a share."""
        if self.rank is None:
            return self.tensors()
        mesh = init_device_mesh("cpu", (self.ranks,))
        return {name: DTensor.from_local(tensor, mesh, [Rows(0)]) for name, tensor in self.tensors().items()}

    def shard(self, tensor: torch.Tensor) -> Shard:
        if self.rank is None or not tensor.dim():
            return Shard.whole(tensor)
        rows, *rest = tensor.shape
        return Shard(tensor, (self.ranks * rows, *rest), (self.rank * rows, *(0 for _ in rest)))

    def fill(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for tensor in self.tensors().values():
            tensor.normal_(generator=generator)


def shape_of(megabytes: float) -> ModelConfig:
    """A model whose parameters and moments take so much."""
    sizes = (
        ModelConfig(num_layers=8, hidden_size=hidden, num_heads=hidden // 32, vocab_size=8192, max_positions=256)
        for hidden in range(32, 8192, 32)
    )
    return next(model for model in sizes if 12 * count(model).total >= megabytes * 1e6)


class Saver:
    """Saves of one side, the newest replacing the older ones. `start` returns what ends the save."""

    def __init__(self, folder: Path, model: ModelConfig, rank: int = 0, ranks: int = 1) -> None:
        self.folder, self.model, self.step, self.rank = folder, model, 0, rank
        self.writer = CheckpointSaver(folder / "castalia", keep_last=1, rank=rank, num_ranks=ranks)

    def start(self, side: str, state: State) -> Callable[[], object]:
        path = self.folder / side
        if side == "castalia":
            self.step += 1
            progress, config = Progress(step=self.step), RunConfig(model=self.model)
            parameters = {name: state.shard(parameter) for name, parameter in state.parameters.items()}
            moments = {
                name: {kind: tensor if kind == "step" else state.shard(tensor) for kind, tensor in kinds.items()}
                for name, kinds in state.moments.items()
            }
            self.writer.save(parameters, moments, progress, config)
            return self.writer.join
        if side == "DCP":
            if self.rank == 0:
                shutil.rmtree(path, ignore_errors=True)
            if state.rank is not None:
                dist.barrier()
            return dcp.async_save(state.placed(), checkpoint_id=path).result
        with open(path, "wb") as file:
            torch.save(state.tensors(), file)
            file.flush()
            os.fsync(file.fileno())
        return lambda: None


def load(side: str, folder: Path, state: State) -> None:
    path = folder / side
    if side == "castalia":
        checkpoint = open_checkpoint(path)
        load_shards({name: state.shard(p) for name, p in state.parameters.items()}, state.model, checkpoint)
        load_optimizer(state.optimizer, state.parameters, checkpoint, shard=state.shard)
    elif side == "DCP":
        dcp.load(state.placed(), checkpoint_id=path)
    else:
        stored = torch.load(path, mmap=True)
        for name, tensor in state.tensors().items():
            first = 0 if state.rank is None else state.rank * len(tensor)
            tensor.copy_(stored[name][first : first + len(tensor)])


def copy(state: State) -> None:
    [tensor.clone() for tensor in state.tensors().values()]


def write_raw(path: Path, state: State) -> None:
    with open(path, "wb", buffering=0) as file:
        for tensor in state.tensors().values():
            write_all(file, memoryview(tensor.numpy()).cast("B"))
        os.fsync(file.fileno())


def write_all(file: Any, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]  # a call writes 2 GB at most


def read_raw(path: Path, state: State) -> None:
    with open(path, "rb", buffering=0) as file:
        for tensor in state.tensors().values():
            data = memoryview(tensor.numpy()).cast("B")
            while data:
                data = data[file.readinto(data) :]


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def resharder(rank: int, model: ModelConfig, folder: Path, rounds: int, ranks: int, results: Any) -> None:
    """A process that has its share of the rows. It reports (task, side, seconds, bytes read)."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=ranks)
    state = State(model, rank, ranks)
    whole = State(model)
    whole.fill()
    for _ in range(rounds):
        for side in SIDES:
            for tensor in state.tensors().values():
                tensor.zero_()
            dist.barrier()
            before = bytes_read()
            seconds = timed(lambda: (load(side, folder, state), dist.barrier()))  # noqa: B023 - called at once
            results.put(("reshard", side, seconds, bytes_read() - before))
            check(side, {name: t.chunk(ranks)[rank] for name, t in whole.tensors().items()}, state)
    saver = Saver(folder / "together", model, rank, ranks)
    for number in range(rounds + 1):  # the first one warms up
        for side in SHARED:
            dist.barrier()
            seconds = timed(lambda: (saver.start(side, state)(), dist.barrier()))  # noqa: B023 - called at once
            if number:
                results.put(("save together", side, seconds, 0))
    saver.writer.close()
    dist.destroy_process_group()


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def check(side: str, wanted: Mapping[str, torch.Tensor], state: State) -> None:
    """Raises AssertionError if the state is not that."""
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, wanted[name]), f"{side} did not give back {name}"


def measure(
    folder: Path, model: ModelConfig, rounds: int, ranks: int
) -> tuple[dict[str, dict[str, list[float]]], list[int]]:
    """Seconds by task and side; the bytes that each process of ours read while it resharded."""
    state, target = State(model), State(model)
    state.fill()
    found: dict[str, dict[str, list[float]]] = {task: {} for task in TARGETS}
    saver, raw = Saver(folder, model), folder / "raw"

    def note(task: str, side: str, seconds: float) -> None:
        found[task].setdefault(side, []).append(seconds)

    for number in range(rounds + 1):  # the first one warms up
        rows: list[tuple[str, str, float]] = []
        for side in SIDES:
            start = time.perf_counter()
            finish = saver.start(side, state)
            rows.append(("blocked", side, time.perf_counter() - start))
            finish()
            rows.append(("save", side, time.perf_counter() - start))
        rows.append(("blocked", "floor", timed(partial(copy, state))))
        rows.append(("save", "floor", timed(partial(write_raw, raw, state))))
        for side in SIDES:
            rows.append(("load", side, timed(partial(load, side, folder, target))))
            check(side, state.tensors(), target)
        rows.append(("load", "floor", timed(partial(read_raw, raw, target))))
        for row in rows if number else ():
            note(*row)
    saver.writer.close()
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(resharder, (model, folder, rounds, ranks, results), nprocs=ranks)
    read = []
    while not results.empty():
        task, side, seconds, count_read = results.get()
        note(task, side, seconds)
        read += [count_read] if (task, side) == ("reshard", "castalia") else []
    for _ in range(rounds):
        for side in SHARED:
            for tensor in target.tensors().values():
                tensor.zero_()
            note("merge", side, timed(partial(load, side, folder / "together", target)))
            check(side, state.tensors(), target)
    for task, like in {"reshard": "load", "merge": "load", "save together": "save"}.items():
        found[task]["floor"] = found[like]["floor"]
    return found, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=600, help="of parameters and moments")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2, help="processes that load a share each")
    parser.add_argument("--folder", default=".", help="on the disk to be measured")
    parser.add_argument("--quick", action="store_true", help="2 MB, one round: does it run and agree?")
    results.option(parser)
    args = parser.parse_args()
    if args.quick:
        args.megabytes, args.rounds = 2, 1
    keep_freed_memory()
    model = shape_of(args.megabytes)
    size = 12 * count(model).total
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        found, read = measure(Path(name), model, args.rounds, args.ranks)
    num_tensors = 3 * len(tensor_shapes(model))
    print(f"{size / 1e6:.0f} MB in {num_tensors} tensors, median of {args.rounds}, {os.cpu_count()} cores")
    print(f"torch {torch.__version__}\n\n| ms | {' | '.join(SIDES)} | floor | floor MB/s | floor / ours | target |")
    print("|---|---|---|---|---|---|---|---|")
    words = {"blocked": "asynchronous save holds up training", "save": "save, until on disk", "load": "load"}
    words["reshard"] = f"load by {args.ranks} processes, a share each"
    words["save together"] = f"save by {args.ranks} processes, a share each"
    words["merge"] = f"load of what {args.ranks} processes saved"
    for task, sides in found.items():
        medians = {side: statistics.median(sides[side]) for side in (*SIDES, "floor") if side in sides}
        results.record(words[task], sides["castalia"])
        ratio = medians["floor"] / medians["castalia"]
        cells = [f"{medians[side] * 1e3:.0f}" if side in medians else "" for side in (*SIDES, "floor")]
        cells.append(f"{size / medians['floor'] / 1e6:.0f}")
        shown = f"{1 / ratio:.2f}x its time" if task == "blocked" else f"{ratio:.2f}"
        print(f"| {' | '.join([words[task], *cells, shown, TARGETS[task]])} |")
    whole = size * len(read) / args.ranks
    print(f"\nbytes that ours read while resharding, over the checkpoint's: {sum(read) / whole:.3f}")


if __name__ == "__main__":
    main()
