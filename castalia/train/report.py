"""What a run says before its first step, so that nobody trains something else than they meant to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.table import Table

from castalia.checkpoint.describe import readable
from castalia.config.schema import RunConfig, Section
from castalia.parallel.layout import layout as parallel_layout
from castalia.parallel.process import world_size
from castalia.plan.count import count
from castalia.train.display import Display
from castalia.train.schedule import LearningRate
from castalia.train.start import Session


def changed_settings(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything that differs from the defaults."""
    yield from _changed(config, "")


def _changed(section: BaseModel, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, info in type(section).model_fields.items():
        value, path = getattr(section, name), prefix + name
        if isinstance(value, Section):
            yield from _changed(value, path + ".")
        elif info.is_required() or value != info.default:
            yield path, value


def show_report(session: Session, display: Display, folder: Path) -> None:
    config = session.config
    origins = {path: re.sub(r"\S*/", "", origin) for path, origin in config.origins.items()}  # files without folders
    elsewhere = "the checkpoint" if session.source else "settled here"
    settings = [
        (path, _shown(value), origins.get(path, elsewhere if path.startswith("model.") else "settled here"))
        for path, value in changed_settings(config)
    ]
    if display.fancy:
        table = Table("setting", "value", "from", title="settings that are not the default", title_justify="left")
        for row in settings:
            table.add_row(*row)
        display.console.print(table)
    else:
        display.line("settings that are not the default:")
        for path, value, origin in settings:
            display.line(f"  {path}: {value}  ({origin})")
    for note in config.notes:
        display.line(f"note: {note}", "yellow")
    for name, text in facts(session, folder):
        display.line(f"{name:<14}{text}")
    if session.loaded is None:
        count = readable(parameter_count(session))
        display.line(f"TRAINING BEGINS FROM RANDOM WEIGHTS: {count} parameters, nothing was loaded", "bold yellow")


def show_first_loss(session: Session, loss: float, display: Display) -> None:
    assert session.config.model is not None and session.config.model.vocab_size is not None
    uniform = math.log(session.config.model.vocab_size)
    display.line(f"first batch: loss {loss:.4f}; a model that knows nothing has ln(vocabulary) = {uniform:.4f}")


def facts(session: Session, folder: Path) -> Iterator[tuple[str, str]]:
    """What is about to happen, as pairs of a name and a text."""
    config, plan, progress = session.config, session.plan, session.progress
    assert config.model is not None
    tokens, last = session.tokens_per_step, session.last
    vocabulary = f"vocabulary {config.model.vocab_size:,} padded to {config.model.padded_vocab_size:,}"
    yield "model", f"{parameter_count(session):,} parameters, {vocabulary}"
    split = f"micro-batch {plan.micro_batch_size} x accumulation {plan.accumulation}"
    yield "batch", f"{plan.batch_size} sequences x {config.data.seq_length} = {tokens:,} tokens a step ({split})"
    if larger := _larger_layout(config):
        yield "layout", larger
    yield "steps", f"{progress.step:,} done of {last:,}, {tokens * last:,} tokens in all"
    yield "learning rate", describe_rate(session.step.rate, progress.step - progress.skipped, last)
    yield "clipping", _clipping(session)
    scale = f", loss scale {session.step.scaler.scale:g}" if session.step.scaler else ""
    compute = config.precision.compute
    yield "precision", f"{compute} compute, fp32 parameters and optimizer, on {session.device}{scale}"
    yield "evaluation", _evaluation(config)
    yield "saved", f"{describe_saves(config)}, in {folder}"
    if session.loaded is not None and session.source is not None:
        yield "loaded", f"{session.loaded} ({session.source.path})"
        for note in (*session.loaded.notes, *session.source.notes):
            yield "", note
        yield "", _restored(session)


def _larger_layout(config: RunConfig) -> str | None:
    layout = config.parallel
    sizes = f"tp {layout.tp} x pp {layout.pp} x cp {layout.cp} on {layout.gpus or 'any number of'} devices"
    if world_size() > 1:
        return f"{parallel_layout(layout, world_size())} on {world_size()} processes"
    if max(layout.tp, layout.pp, layout.cp, layout.gpus or 1) == 1:
        return None
    return f"one process; the config's {sizes} is a larger job of the same batch and results"


def _restored(session: Session) -> str:
    if not session.resumed:
        return "init_from: only weights are taken; optimizer, schedule and data position start anew"
    moments = "restored" if session.config.checkpoint.load_optimizer else "start anew (checkpoint.load_optimizer=false)"
    return f"resume: optimizer moments {moments}; schedule and data go on after step {session.progress.step}"


def describe_rate(rate: LearningRate, updates: int, last: int) -> str:
    warmup = f"warm-up {rate.warmup:g} steps to {rate.peak:g}" if rate.warmup else f"no warm-up, {rate.peak:g}"
    return f"{rate(updates):.3g} first, {rate(last - 1):.3g} last; {warmup}, {rate.style} until step {rate.end:,}"


def describe_saves(config: RunConfig) -> str:
    saves = config.checkpoint
    parts = [f"every {saves.every} steps"] if saves.every else []
    if saves.log_base:
        parts.append(f"powers of {saves.log_base:g}" + (f" up to {saves.log_until}" if saves.log_until else ""))
    if saves.steps:
        parts.append("steps " + ", ".join(map(str, saves.steps[:12])) + (", ..." if len(saves.steps) > 12 else ""))
    if saves.keep_last:
        milestones = f" and multiples of {saves.keep_every}" if saves.keep_every else ""
        parts.append(f"keeping the last {saves.keep_last}{milestones}")
    return "; ".join([*parts, "the last step"]) + ("" if saves.save_optimizer else "; without optimizer state")


def parameter_count(session: Session) -> int:
    assert session.config.model is not None
    return count(session.config.model).total


def _clipping(session: Session) -> str:
    if session.step.clip_norm:
        return f"gradients are scaled down to a norm of {session.step.clip_norm:g}"
    if session.config.optimizer.clip_norm:
        return f"off: the original ignores clip_norm={session.config.optimizer.clip_norm:g} (neox_exact)"
    return "off"


def _evaluation(config: RunConfig) -> str:
    if not config.eval.every or not config.eval.batches:
        return "none during training"
    return f"every {config.eval.every} steps on {config.eval.batches} batches"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(_shown(entry) for entry in value)
    if isinstance(value, BaseModel):
        return " ".join(f"{entry}" for entry in value.model_dump(exclude_defaults=True).values())
    return str(value)
