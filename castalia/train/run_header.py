"""What a run prints before its first step, so that nobody trains something else than they meant to."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from castalia.checkpoint.adapters import adapters_of
from castalia.checkpoint.tensors import Checkpoint, GuessNote
from castalia.config.attention_kernels import AMPERE
from castalia.config.batch import sum_until
from castalia.config.fields import changed
from castalia.config.loss_chunks import CHUNK_BYTES
from castalia.config.neox.clipping import effective_clip_norm
from castalia.config.schema import RunConfig, is_balance
from castalia.config.tensor_table import adapter_shapes, tensor_shapes
from castalia.data.indexed import open_dataset
from castalia.data.pairs import Pairs
from castalia.data.split import describe_held_out, one_sided
from castalia.machine import usable_cores
from castalia.model.attention import capability
from castalia.observe.display import Display
from castalia.parallel.rank_grid import layout as parallel_layout
from castalia.parallel.rendezvous import world_size
from castalia.plan.count import count
from castalia.plan.layout import Layout
from castalia.plan.plan_parts import TrainingPlan
from castalia.plan.run_description import clipping, describe_training, passes_text
from castalia.plan.run_plan import RunFacts, training, warnings
from castalia.plan.step_cost import USUAL_MFU
from castalia.train.fast_paths import fast_paths
from castalia.train.recomputing import layout_in_run
from castalia.train.run_facts import collect_run_facts
from castalia.train.setup import Session
from castalia.train.step_record import peak_speed
from castalia.units import duration, plural, short_number
from castalia.wrapping import aligned, shortened, wrapped

KNOWS_NOTHING = 0.9  # of ln(vocabulary): above this a model has learnt next to nothing
HEADER = "header.txt"  # in the run's folder
MOST_LINES = 12
LOUD_DAYS, LOUD_EPOCHS = 30, 10
INFERRED = "inferred"  # the origin of a value that neither a file nor the command line gives


def show_header(session: Session, display: Display, folder: Path, *, kept: bool, verbose: bool = False) -> str:
    """Prints what will happen, in at most MOST_LINES lines or in full, and warnings. Returns the text in full.

    `kept`: the caller writes that text into the folder, as HEADER. Does nothing on other ranks than the first.
    """
    if session.executor.rank > 0:
        return ""
    known, layout = run_facts_of(session), planned_layout(session)
    surprises = [*warnings(session.config, known, layout), *_tokenizer_warnings(session), *_one_sided(session.config)]
    surprises += _clipping_warning(session)
    # Notes on a checkpoint stand in the full text, but what had to be guessed of its model decides what is trained.
    guesses = [text for text in _source_notes(session) if isinstance(text, GuessNote)] if session.source else []
    surprises = [wrapped(f"warning: {text}") for text in (*surprises, *guesses)]
    planned, seconds = training(session.config, known, layout), expected_seconds(session)
    full, loud = list(full_lines(session, folder, known, layout)), [*loud_lines(session, planned.epochs, seconds)]
    file = f"{folder / HEADER}, or --verbose" if kept else "--verbose"
    for line in full if verbose else brief_lines(session, folder, planned, seconds, file):
        display.as_it_is(line)
    for text in surprises:
        display.as_it_is(text, "yellow")
    for text in loud:
        display.as_it_is(text, "bold yellow")
    return "\n".join([*full, *surprises, *loud, ""])


def loud_lines(session: Session, epochs: Mapping[str, float], seconds: float | None) -> Iterator[str]:
    """What nobody may overlook: weights that were not loaded, and a run that is much longer than it was meant."""
    if session.source is None:
        number = short_number(parameter_count(session))
        yield f"TRAINING BEGINS FROM RANDOM WEIGHTS: {number} parameters, nothing was loaded"
    if seconds and seconds > LOUD_DAYS * 86400:
        yield f"THIS RUN TAKES ABOUT {duration(seconds).upper()}; shorter: train.steps=N, or train.max_hours=H"
    passes = max(epochs.values(), default=0)
    if passes > LOUD_EPOCHS:
        yield f"THIS RUN READS ITS DATA {passes:,.0f} TIMES; less often: train.steps=N, or train.epochs=N"


def brief_lines(
    session: Session, folder: Path, planned: TrainingPlan, seconds: float | None, more: str
) -> Iterator[str]:
    """At most MOST_LINES lines. `more`: where the others are."""
    config = session.config
    rows = [
        ("model", _model(session)),
        ("computes", f"in {config.precision.compute} on {_brief_device(session)}"),
        ("data", _brief_data(config, planned.epochs)),
        *((name, text) for name, text in describe_training(planned) if name == "batch"),
        ("the run", _brief_length(session, planned, seconds)),
        ("learning rate", _brief_rate(planned)),
        ("evaluated", planned.evaluated),
        ("saved", f"{planned.saved}, in {folder}"),
    ]
    if session.source is not None:
        rows.append(("loaded", f"{session.loaded} ({session.source.path})"))
        rows += _brief_restoration(session)
    notes = len(config.notes) + (len(_source_notes(session)) if session.source else 0)
    said = f"{len(changed(config))} settings" + (f", {notes} note{'s' * (notes > 1)}" if notes else "")
    rows.append(("more", f"{more}: {said}"))
    if held := _held_out(config):
        place = next(number for number, (name, _) in enumerate(rows) if name == "evaluated")
        both = [("held out", held), rows[place]]  # in one line where a line for each would be one too many
        rows[place : place + 1] = both if len(rows) < MOST_LINES else [("held out", f"{held}; {rows[place][1]}")]
    assert len(rows) <= MOST_LINES
    for name, text in rows:
        yield shortened(f"{name:<14}{text}")


def _model(session: Session) -> str:
    model, total = session.config.model, parameter_count(session)
    active = count(model).active
    computing = f", {active:,} of them for each token" if active < total else ""
    sizes = f"{model.num_layers} layers x {model.hidden_size}, vocabulary {model.vocab_size:,}"
    trained, every = _sizes(session)
    return (
        f"{total:,} parameters{computing}"
        + (f", {trained:,} of {every:,} train" if trained < every else "")
        + f"; {sizes}"
    )


def _sizes(session: Session) -> tuple[int, int]:
    """The number of parameters that train and of all, adapters and padding included.

    Without the biases of balanced routers, which steps move, but no gradient.
    """
    config = session.config
    shapes = tensor_shapes(config.model) | adapter_shapes(config.model, config.finetune.lora)
    sizes = {name: math.prod(shape) for name, shape in shapes.items() if not is_balance(name)}
    return sum(size for name, size in sizes.items() if config.finetune.trains(name)), sum(sizes.values())


def _brief_device(session: Session) -> str:
    layout, world = session.config.parallel, world_size()
    ranks = f"{parallel_layout(layout, world)} on {world} processes" if world > 1 else "one process"
    return f"{session.device}, {ranks}{_cores(session)}"


def _cores(session: Session) -> str:
    """What decides the pace on CPUs: the threads of a process, and the load of a machine that is busy already."""
    if session.device.type != "cpu":
        return ""
    cores, load = usable_cores(), os.getloadavg()[0]
    busy = f" (busy machine: load {load:.0f} on {plural(cores, 'core')})" if load > cores + 1 else ""
    return f", {plural(torch.get_num_threads(), 'thread')}{busy}"


def _brief_data(config: RunConfig, epochs: Mapping[str, float]) -> str:
    if len(epochs) == 1:
        ((path, passes),) = epochs.items()
        return f"{passes_text(passes)} epochs of {path}"
    if not epochs:
        named = str(config.data.path or ", ".join(source.path for source in config.data.train))
        later = ", ".join(str(stage.first_step) for stage in config.data.stages)
        return f"{named}; by data.stages from step {later} on" if later else named
    return f"{passes_text(min(epochs.values()))} to {passes_text(max(epochs.values()))} epochs of {len(epochs)} corpora"


def _brief_length(session: Session, planned: TrainingPlan, seconds: float | None) -> str:
    done = f"; {session.progress.step:,} are done" if session.progress.step else ""
    text = f"{session.last:,} steps, {planned.tokens or 0:,} tokens{done}"
    return f"{text}; about {duration(seconds)} at {USUAL_MFU:.0%} of the device's peak" if seconds else text


def _brief_rate(planned: TrainingPlan) -> str:
    warmup = planned.warmup_steps or 0
    if planned.first_lr is None or planned.last_lr is None:
        return f"{planned.peak_lr:.3g}"
    return f"{planned.peak_lr:.3g} after {warmup:,.3g} steps of warm-up, then {planned.style} to {planned.last_lr:.3g}"


def _brief_restoration(session: Session) -> list[tuple[str, str]]:
    """What was restored, and what was not."""
    rows = list(restoration_rows(session))
    restored = ", ".join(what for what, how, _ in rows if how == "restored")
    if not session.resumed:
        new = ", ".join(what for what, how, _ in rows if how != "restored")
        return [("restored", restored), ("new", f"{new}: checkpoint.init_from begins a new run")]
    others = "; ".join(f"{what} {how} ({why})" for what, how, why in rows if how != "restored")
    return [("restored", restored), *([("not restored", others)] if others else [])]


def expected_seconds(session: Session) -> float | None:
    """How long the rest of the run takes at USUAL_MFU of the devices' peak; None where the peak is unknown."""
    peak, left = peak_speed(session), session.last - session.progress.step
    return left * session.tokens_of(session.last) / (USUAL_MFU * peak) if peak else None


def full_lines(session: Session, folder: Path, known: RunFacts, layout: Layout) -> Iterator[str]:
    """Settings, notes, what will happen, what was loaded, what was restored and why."""
    config = session.config
    # Values without an origin were inferred: the model's from the checkpoint, the others here.
    origins = {path: re.sub(r"\S*/", "", origin) for path, origin in config.origins.items()}  # files without folders
    elsewhere = "from the checkpoint" if session.source else INFERRED
    yield "settings that are not the default:"
    yield from aligned(
        [
            (path, _shown(value), origins.get(path, elsewhere if path.startswith("model.") else INFERRED))
            for path, value in changed(config).items()
        ]
    )
    for note in config.notes:
        yield wrapped(f"note: {note}")
    yield from aligned(list(summary_lines(session, folder, known, layout)), indent=0)
    if session.source is None:
        return
    yield wrapped(f"{'loaded':<14}{session.loaded} ({session.source.path})", 14)
    for note in _source_notes(session):
        yield wrapped(f"note: {note}")
    yield "restored and reset:"
    yield from aligned(list(restoration_rows(session)))


def _source_notes(session: Session) -> list[str]:
    """What opening and loading the checkpoint had to say."""
    assert session.source is not None
    loaded = session.loaded.notes if session.loaded else ()
    return [*loaded, *session.source.notes, *session.source.state_notes]


def show_first_loss(session: Session, loss: float, display: Display) -> None:
    """Prints the first loss and that of a uniform prediction, and a warning if a loaded model is hardly better."""
    if session.step.preference:  # its loss says nothing about what the model knows
        return
    uniform = math.log(session.config.vocab_size)
    display.line(f"first batch: loss {loss:.4f}; guessing at random would give {uniform:.4f}, ln(vocabulary)")
    # A run that continues on its own data may be a few steps old.
    known = session.resumed and session.source and session.source.facts.data_fingerprint == session.data.fingerprint
    if session.source is not None and loss > KNOWS_NOTHING * uniform and not known:
        display.line(
            "warning: the loaded model predicts this data no better than random weights would: the corpus may belong "
            "to another tokenizer, or the checkpoint may hold a model that was never trained; "
            f"see `castalia inspect {session.source.path}` and `castalia data batch CONFIG --step 1`",
            "bold yellow",
        )


def _tokenizer_warnings(session: Session) -> Iterator[str]:
    model, tokenizer = session.config.model, session.tokenizer
    if tokenizer and tokenizer.note:
        yield tokenizer.note
    if model and tokenizer and 2 * tokenizer.vocab_size < model.padded_vocab_size and model.padded_vocab_size > 1024:
        sizes = (
            f"the tokenizer has {tokenizer.vocab_size:,} ids and the model {model.padded_vocab_size:,} rows for them: "
        )
        if session.source is None:
            smaller = model.with_({"vocab_size": tokenizer.vocab_size})
            saved = short_number(count(model).total - count(smaller).total)
            yield f"{sizes}model.vocab_size=null gives it as many as the tokenizer needs, and saves {saved} parameters"
        else:
            yield f"{sizes}it may be another model's; name the right one (tokenizer.path)"


def _clipping_warning(session: Session) -> Iterator[str]:
    """Tells of a run that went on under GPT-NeoX without the clipping that its config asks for."""
    source, norm = session.source, session.config.optimizer.clip_norm
    if source is None or session.progress.step == 0 or session.config.neox_exact:
        return
    if norm and effective_clip_norm(norm, source.release) is None:
        yield (
            f"gradients are clipped to {norm:g} from here on; GPT-NeoX left that off, as always at its default: the "
            "losses will not be its own. As it went on: neox_exact=true, or optimizer.clip_norm=null for this alone"
        )


def run_facts_of(session: Session) -> RunFacts:
    """The facts that the planner is given about a run in memory."""
    known = replace(collect_run_facts(session.config), rate=session.step.rate, device=session.device.type)
    return replace(known, capability=capability(session.device) or AMPERE)


def planned_layout(session: Session) -> Layout:
    """The planner's layout of this run. One process does the work of all ranks, whatever the config's layout."""
    return layout_in_run(session.config, session.executor.world, session.plan)


def summary_lines(session: Session, folder: Path, known: RunFacts, layout: Layout) -> Iterator[tuple[str, str]]:
    """The run in lines, each a name and a text: model, device, schedule, data, memory, checkpoints."""
    config, progress = session.config, session.progress
    vocabulary = f"vocabulary {config.model.vocab_size:,} padded to {config.model.padded_vocab_size:,}"
    yield "model", f"{parameter_count(session):,} parameters, {vocabulary}"
    trained, every = _sizes(session)
    if trained < every:
        rank = f"; adapters of rank {config.finetune.lora.rank}" if config.finetune.lora else ""
        yield "trains", f"{trained:,} of {every:,} parameters{rank}"
    yield "device", f"{session.device}, {_processes(config)}{_cores(session)}"
    planned = training(config, known, layout)
    scale = f", now {session.step.scaler.scale:g}" if session.step.scaler else ""
    planned = replace(
        planned,
        clipping=_clipping(session),
        precision=planned.precision + scale,
        saved=f"{planned.saved}, in {folder}",
    )
    # The planner does not know what this run has restored or switched off, so some of its lines are replaced.
    yield "fast paths", _fast_paths(session, planned.attention.partition(";")[0])
    if session.step.recomputing:
        yield "recompute", str(session.step.recomputing)
    for name, text in describe_training(planned):
        yield name, text
        if name == "evaluated" and (held_out := _held_out(config)):
            yield "held out", held_out
        if name == "the run" and progress.step:
            now = session.step.rate(progress.step - progress.skipped)
            yield "", f"{progress.step:,} steps are done; the next one's learning rate is {now:.3g}"


def _held_out(config: RunConfig) -> str | None:
    """The documents that the run is judged by, where one corpus is divided."""
    return describe_held_out(config.data, open_dataset(config.data.path)) if config.data.path else None


def _one_sided(config: RunConfig) -> Iterator[str]:
    """A warning where validation comes from few of the corpus' files."""
    if config.data.path and (warning := one_sided(config.data, open_dataset(config.data.path))):
        yield warning


def _fast_paths(session: Session, kernel: str) -> str:
    """What was chosen for this machine, and what each missing fast path costs."""
    first, why = session.compiling
    blocks = f"not compiled: {why}" if first is None else f"compiled from step {first + 1} on: {why}"
    mib = CHUNK_BYTES[session.device.type] >> 20
    lacking = [f"no {path.name}: {path.cost}" for path in fast_paths(session.device) if not path.available]
    chosen = f"{session.config.precision.compute} compute, {kernel}, logits {mib} MiB at a time"
    return "; ".join([chosen, blocks, *lacking])


def _processes(config: RunConfig) -> str:
    layout, world = config.parallel, world_size()
    if world > 1:
        return f"{parallel_layout(layout, world)} on {world} processes"
    if max(layout.tp, layout.pp, layout.cp, layout.gpus or 1) == 1:
        return "one process"
    sizes = f"tp {layout.tp} x pp {layout.pp} x cp {layout.cp} on {layout.gpus or 'any number of'} devices"
    number = layout.gpus or layout.model_ranks
    return f"one process: {sizes} makes the same batches and results sooner (--nproc {number} starts it here)"


def restoration_rows(session: Session) -> Iterator[tuple[str, str, str]]:
    """What was restored from the checkpoint and what starts anew: rows of item, outcome, reason."""
    config, source, progress = session.config, session.source, session.progress
    assert source is not None and session.loaded is not None
    yield "weights", "restored", f"{session.loaded.loaded} of {session.loaded.expected} tensors"
    if config.finetune.lora and adapters_of(source) is None:
        yield "adapters", "new", f"seed {config.seed}; they change nothing yet"
    if not session.resumed:
        new = "init_from begins a new run"
        yield "fp32 masters", "reset", "made from the weights, which they then are"
        yield "moments", "reset", f"{new}: averages of other gradients would mislead it"
        if session.step.scaler:
            yield "loss scale", "reset", f"{new}: it starts at {session.step.scaler.scale:g}"
        yield "schedule", "reset", f"{new}: its learning rate warms up and decays by this config"
        yield "step", "reset", f"{new}: the first step is 1 of {session.last:,}"
        yield "data position", "reset", f"{new}: it begins with the first batch of its own data"
        yield "randomness", "reset", f"{new}: dropout follows from seed {config.seed}, step and micro-batch"
        return
    if config.checkpoint.load_optimizer:
        yield "fp32 masters", "restored", "the optimizer's own copies" if source.format != "native" else "the weights"
        old, now = source.summed_micro_batches, session.quirks.gradient_factor
        why = f"the optimizer's averages for {len(source.optimizer or ())} tensors"
        if old != now:
            factor = f"divided by {old} and {old}^2" if now == 1 else f"multiplied by {now}/{old} and its square"
            why += f", {factor}: GPT-NeoX's pipeline engine had added up {old} micro-batches where their mean was "
            why += "meant" if now == 1 else f"meant, and now adds up {now}"
        yield "moments", "restored", why
    else:
        yield "fp32 masters", "reset", "checkpoint.load_optimizer=false: made from the weights"
        yield "moments", "reset", "checkpoint.load_optimizer=false"
    if session.step.scaler:
        how = "restored" if progress.loss_scale else "reset"
        why = "" if progress.loss_scale else "the checkpoint stores none: "
        yield "loss scale", how, f"{why}{session.step.scaler.scale:g}"
    by = "config" if config.checkpoint.schedule_from == "config" or not progress.schedule else "checkpoint"
    yield "schedule", "restored", f"{progress.step - progress.skipped:,} updates are done; the {by} says what follows"
    yield "step", "restored", f"the next one is {progress.step + 1:,} of {session.last:,}"
    yield "data position", *_data_position(session, source)
    yield "randomness", "restored", f"dropout follows from seed {config.seed}, step and micro-batch"


def _data_position(session: Session, source: Checkpoint) -> tuple[str, str]:
    """Where a resumed run reads on, counted in samples: outcome and reason."""
    step, train, size = session.progress.step, session.config.train, session.plan.batch_size
    read = sum_until(train.batch_size_warmup, step, size, train.earlier_batches)
    what = "pairs" if isinstance(session.data, Pairs) else "samples"
    known = source.facts.data_fingerprint
    if known and known != session.data.fingerprint_until(step):
        return "moved", f"checkpoint.other_data: continues after {read:,} {what}, but of other data"
    before = source.config.train.batch_size if source.config else None
    if session.config.neox_exact and before and before != size:
        return "moved", f"after {step:,} batches of {size:,}, as GPT-NeoX continues (neox_exact); they had {before:,}"
    if before is None:
        return "restored", f"after {read:,} {what}, if a batch had {size:,} before as well"
    changed = [span for span in train.earlier_batches if span.until == step]
    sizes = f": a batch had {changed[0].batch_size:,} until here and has {size:,} from here on" if changed else ""
    return "restored", f"{read:,} {what} are read, and none is read twice or left out{sizes}"


def parameter_count(session: Session) -> int:
    """Parameters of the whole model, without padding."""
    return count(session.config.model).total


def _clipping(session: Session) -> str:
    wanted = session.config.optimizer.clip_norm
    if session.step.clip_norm is None and wanted:
        return f"off: GPT-NeoX ignores clip_norm={wanted:g} (neox_exact)"
    return clipping(session.config.with_({"neox_exact": False}))


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(_shown(entry) for entry in value)
    if isinstance(value, BaseModel):
        return " ".join(f"{entry}" for entry in value.model_dump(exclude_defaults=True).values())
    return str(value)
