"""What a training run prints: a progress bar and styled lines on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import IO, TYPE_CHECKING, Any, cast

from castalia.bars import Advance, progress
from castalia.units import duration
from castalia.wrapping import WIDTH, wrapped

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

RECENT = 20  # steps whose median tells how long the others take


class Stdout(io.TextIOBase):
    """Standard output that survives its reader (`| head`, a closed terminal): later output is dropped, and the run
    continues."""

    def write(self, text: str) -> int:
        """As a text stream's."""
        self._try(lambda: self._stdout.write(text))
        return len(text)

    def flush(self) -> None:
        """As a text stream's."""
        self._try(self._stdout.flush)

    def isatty(self) -> bool:
        """Whether standard output is a terminal."""
        return self._stdout.isatty()

    def fileno(self) -> int:
        """The file descriptor of standard output."""
        return self._stdout.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of standard output."""
        return self._stdout.encoding

    @property
    def _stdout(self) -> Any:
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # behind rich's open progress bar

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # for later output, and for what is still buffered
            os.close(nowhere)


class Display:
    """Prints to standard output. A context manager: leaving it ends the progress bar."""

    def __init__(self, silent: bool = False) -> None:
        self.silent, self.out = silent, Stdout()
        self.console: Console | None = None  # of a terminal alone: elsewhere rich need not be imported
        self.bar: Progress | None = None
        if self.out.isatty() and not silent:
            from rich.console import Console

            self.console = Console(file=cast("IO[str]", self.out), highlight=False, soft_wrap=True, markup=False)

    def start(self, done: int, last: int, tokens: int) -> None:
        """Begins the progress bar of a run that has done `done` of `last` steps and `tokens` tokens."""
        self.last = last
        self.first, self.began = done, time.perf_counter()
        self.marked_tokens, self.marked_seconds, self.seconds = tokens, 0.0, 0.0
        self.recent: deque[float] = deque(maxlen=RECENT)
        if self.console:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(None),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task("training", total=last, completed=done)
            self.bar.start()

    @contextmanager
    def working(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """A bar of something else than steps, gone when that is done."""
        if self.bar is None:
            with progress(total, shown=not self.silent) as advance:
                advance(0, name)
                yield advance
            return
        bar, task = self.bar, self.bar.add_task(name, total=total)

        def advance_it(done: int, text: str = "", total: int | None = None) -> None:
            bar.update(task, advance=done, description=text or None, total=total)

        try:
            yield advance_it
        finally:
            bar.remove_task(task)

    def line(self, text: str, style: str | None = None) -> None:
        """Prints a line, wrapped where it is too long, and styled on a terminal."""
        self.as_it_is(wrapped(text), style)

    def as_it_is(self, text: str, style: str | None = None) -> None:
        """Prints a line that fits already, or that is to be copied."""
        if self.console:
            self.console.print(text, style=style)
        elif not self.silent:
            print(text, file=self.out, flush=True)

    def advance(self, record: Mapping[str, Any]) -> None:
        """Counts a step, given its record."""
        self.seconds += record["seconds"]
        self.recent.append(record["seconds"])
        if self.bar:
            self.bar.update(self.task, completed=record["step"])

    def step(self, record: Mapping[str, Any], peak: float | None) -> None:
        """Prints the last step's values and the speed since the line before.

        `peak` is in tokens per second at the peak matmul rate of all devices.
        """
        done = record["step"]
        # By the seconds of the steps alone, without saving and evaluating.
        speed = (record["tokens"] - self.marked_tokens) / (self.seconds - self.marked_seconds)
        self.marked_tokens, self.marked_seconds = record["tokens"], self.seconds
        norm = "overflow, skipped" if record["grad_norm"] is None else f"{record['grad_norm']:.3f}"
        parts = [
            f"step {done:>{len(str(self.last))}}/{self.last}",
            f"loss {record['loss']:.4f}" if record["loss"] is not None else "loss nan",
            f"lr {record['lr']:.2e}",
            f"grad norm {norm}",
            f"{speed:,.0f} tokens/s",
        ]
        if peak is not None and speed <= peak:  # a busy CPU's measured peak may be too low
            parts.append(f"MFU {speed / peak:.1%}")
        parts.append(f"ETA {duration(round(self._seconds_left(done)))}")
        more = [f"{name} {record[name]:.3f}" for name in ("margin", "accuracy") if name in record]
        if "expert_imbalance" in record:
            more.append(f"fullest expert {record['expert_imbalance']:.2f} times the mean")
        if "valid_loss" in record:
            more.append(f"valid loss {record['valid_loss']:.4f}")
        text = "  ".join([*parts, *more])
        self.as_it_is(text if len(text) <= WIDTH else "\n  ".join(map("  ".join, (parts, more))))

    def expect(self, done: int, seconds: float) -> None:
        """Says in the first step, after `done` others, that a step takes about so many seconds."""
        whole = duration((self.last - done) * seconds)
        self.line(f"a step takes about {duration(seconds)}, by its first micro-batches; ETA {whole}")

    def _seconds_left(self, done: int) -> float:
        """By the median of the last steps, and by what saving and evaluating took between them so far."""
        between = (time.perf_counter() - self.began - self.seconds) / (done - self.first)
        return (self.last - done) * (median(self.recent) + max(0.0, between))

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()
