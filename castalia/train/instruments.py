"""Instruments that a config can ask for: statistics of every layer at some steps, and a profile of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import profile

from castalia.config.schema import LogConfig
from castalia.files import appearing_whole, write_text
from castalia.observe.layer_stats import activation_statistics, expert_shares, tensor_statistics
from castalia.observe.metrics import as_line
from castalia.parallel.executor import Executor
from castalia.train.step_memory import open_profile

LAYERS = "layers.jsonl"
SUMMARY_ROWS = 20
SHOWN = 6  # operations on the terminal


class Instruments:
    """`around(step)` encloses each step, counted from 1. On exit, a running profiler is stopped and its trace saved."""

    def __init__(
        self,
        log: LogConfig,
        folder: Path,
        executor: Executor,
        say: Callable[[str], None],
    ):
        self.log, self.folder, self.executor, self.say = log, folder, executor, say
        self.profiler: profile | None = None

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """A context manager around one step: profiles it, or collects activation statistics, where that is due."""
        wanted = self.log.profile
        if wanted and self.profiler is None and wanted.start <= step <= wanted.stop:
            self._start_profile()
        # Hooks are only there in steps that need them, because they cost time.
        if self._shows_layers(step):
            with activation_statistics(self.executor) as self.activations:
                yield
        else:
            yield
        if wanted and step == wanted.stop:
            self._write_profile()

    def before_update(self, step: int, loss_scale: float = 1.0) -> None:
        """Writes the step's statistics to layers.jsonl where they are due. Gradients must be complete."""
        if not self._shows_layers(step):
            return
        statistics = {"activations": self.activations(), **tensor_statistics(self.executor, loss_scale)}
        if shares := expert_shares(self.executor):
            statistics["experts"] = shares
        if self.executor.rank == 0:
            with open(self.folder / LAYERS, "a") as file:
                file.write(as_line({"step": step, **statistics}))

    def _shows_layers(self, step: int) -> bool:
        return self.log.layers_every is not None and step % self.log.layers_every == 0

    def _start_profile(self) -> None:
        if self.executor.device.type == "cuda":
            torch.cuda.memory._record_memory_history()  # for memory.pickle, which pytorch.org/memory_viz draws
        self.profiler = open_profile(self.executor.device)
        self.profiler.__enter__()

    def _write_profile(self) -> None:
        """Writes a trace for Perfetto, tables of the costliest operations, and a GPU's memory history."""
        profiler, self.profiler = self.profiler, None
        if profiler is None or self.log.profile is None:
            return
        profiler.__exit__(None, None, None)
        folder = Path(self.log.profile.dir) if self.log.profile.dir else self.folder / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        with appearing_whole(folder / "trace.json") as path:
            profiler.export_chrome_trace(str(path))
        # Self time and memory: an operation's own, without those that it calls.
        averages, place = profiler.key_averages(), "device" if self.executor.device.type == "cuda" else "cpu"
        tables = [
            f"By {key.replace('_', ' ')}\n{averages.table(sort_by=key, row_limit=SUMMARY_ROWS)}"
            for key in (f"self_{place}_time_total", f"self_{place}_memory_usage")
        ]
        write_text(folder / "summary.txt", "\n".join(tables))
        times = {event.key: getattr(event, f"self_{place}_time_total") for event in averages}
        self.say(f"profile of steps {self.log.profile.start} to {self.log.profile.stop} in {folder}; most time went to")
        for name, time in sorted(times.items(), key=lambda item: -item[1])[:SHOWN]:
            self.say(f"  {time / max(1, sum(times.values())):6.1%}  {name}")
        if place == "device":
            with appearing_whole(folder / "memory.pickle") as path:
                torch.cuda.memory._dump_snapshot(str(path))
            torch.cuda.memory._record_memory_history(enabled=None)

    def __enter__(self) -> Instruments:
        return self

    def __exit__(self, *_: object) -> None:
        self._write_profile()  # where the run ends within the profiled steps
