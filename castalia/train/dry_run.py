"""`castalia train --dry-run`: everything up to and including one step, without writing anything."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from castalia.config.schema import RunConfig
from castalia.machine import keep_freed_memory
from castalia.observe.display import Display
from castalia.parallel.process_group import process_group
from castalia.train.hardware import choose_device
from castalia.train.resolve import refuse_folder_in_use
from castalia.train.run_folder import continues_in_place, run_folder
from castalia.train.run_header import planned_layout, show_first_loss, show_header
from castalia.train.setup import Session, build_index, set_up
from castalia.train.step_memory import PeakMemory, measured_and_planned
from castalia.units import duration, memory_size


def rehearse(config: RunConfig, verbose: bool = False) -> dict[str, Any]:
    """Sets the run up, trains one step in memory and reports its loss, memory and speed; returns these."""
    keep_freed_memory()
    folder = run_folder(config)
    if not continues_in_place(config, folder):
        refuse_folder_in_use(config, folder)
    with process_group(choose_device(config.train.device).type, config.parallel.timeout):
        return _show_one_step(set_up(config), folder, verbose)


def _show_one_step(session: Session, folder: Path, verbose: bool) -> dict[str, Any]:
    with Display(silent=session.executor.rank > 0) as display:
        show_header(session, display, folder, kept=False, verbose=verbose)
        with display.working("the order of the samples") as advance:
            build_index(session, advance)
        done, choice = session.progress.step, session.step.recomputing
        in_force = choice and choice.in_force  # in this step, which may be the one that measures
        session.executor.cuts_padding = False  # the memory is that of the longest rows
        begin = time.perf_counter()
        # Model and optimizer exist by now, so the peak is what the step needs beyond them.
        with PeakMemory(session.device) as memory:
            result = session.step(done, session.batch(done))
        seconds = time.perf_counter() - begin
        show_first_loss(session, result.loss, display)
        if choice:
            display.line(f"recompute: {choice}")
        measured, planned = measured_and_planned(session, planned_layout(session), memory.bytes)
        planned = in_force.memory().total if in_force else planned
        took = f"tensors took {memory_size(measured)}, plan says {memory_size(planned)} ({measured / planned - 1:+.1%})"
        unmeasured = f"plan says {memory_size(planned)}; torch does not tell what a step takes on {session.device.type}"
        display.line(f"memory: {unmeasured if session.device.type == 'mps' else took}")
        left = session.last - done
        display.line(
            f"one step took {seconds:.2f} s, {session.tokens_of(done) / seconds:,.0f} tokens/s (the first is slow); "
            f"at this pace the whole run, {left:,} steps, takes {duration(seconds * left)}"
        )
        display.line("dry run: the folder of the run was not touched")
    return {
        "step": done + 1,
        "steps": session.last,
        "loss": result.loss,
        "memory_bytes": measured,
        "planned_bytes": planned,
        "seconds_per_step": seconds,
        "tokens_per_step": session.tokens_of(done),
    }
