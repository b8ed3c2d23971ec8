"""How good a run has become: figures, samples and what they share with the training text, and how to continue."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from castalia.checkpoint.opener import open_checkpoint
from castalia.config.schema import RunConfig
from castalia.data.split import other_held_out
from castalia.errors import DataError
from castalia.files import write_text
from castalia.observe.metrics import read_events, read_metrics
from castalia.plan.count import count
from castalia.report.baselines import byte_entropy, gzip_bits, token_unigram_bits, xz_bits
from castalia.report.held_out import (
    HeldOut,
    Judged,
    Score,
    by_source,
    load,
    named_text,
    respelled,
    score,
    validation_text,
)
from castalia.report.samples import Sample, Search, training_corpora, write_samples
from castalia.train.run_folder import is_run
from castalia.units import duration, short_number

COUNTED_TOKENS = 1 << 24  # of the training text, for frequencies of tokens
REASONS = "reasons.json"  # in a run's folder: why its settings are what they are, by their names


class Bar(NamedTuple):
    """One way to write the held-out text, and how many bits a byte it takes."""

    name: str
    bits_per_byte: float
    kind: str  # "this run", "run" or "baseline"


class SourceScore(NamedTuple):
    """How well the model predicts the held-out text of one source."""

    name: str
    bytes: int  # of its held-out text
    loss: float
    bits_per_byte: float | None
    xz_bits_per_byte: float


class Row(NamedTuple):
    """A fact about the run, its value, and the reason for it."""

    what: str
    value: str
    why: str


class Next(NamedTuple):
    """A suggestion and the command that does it."""

    what: str
    command: str


@dataclass(frozen=True)
class Report:
    """Plain values; `report_text.py` and `report_page.py` show them."""

    name: str
    checkpoint: str
    step: int
    sentence: str  # the verdict
    held_out: str  # what the figures are of
    score: Score
    bars: tuple[Bar, ...]
    sources: tuple[SourceScore, ...]
    samples: tuple[Sample, ...]
    search: Search | None  # None: no training text is here
    rows: tuple[Row, ...]
    next: tuple[Next, ...]
    notes: tuple[str, ...]
    records: Mapping[str, list[dict[str, Any]]]  # of the runs that have some, by name

    @property
    def perplexity(self) -> float:
        """exp(loss), cut off where it would overflow."""
        return math.exp(min(self.score.loss, 700.0))

    def as_json(self) -> dict[str, Any]:
        """Nested plain values."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "records"}
        curves = {
            name: [{key: record.get(key) for key in ("step", "loss", "valid_loss", "lr")} for record in records]
            for name, records in self.records.items()
        }
        return {**{name: _plain(value) for name, value in own.items()}, "curves": curves}


def _plain(value: Any) -> Any:
    if isinstance(value, Score):
        return dict(vars(value))
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(inner) for name, inner in value._asdict().items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple) else value


def write_report(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    others: Sequence[str] = (),
    data: str | None = None,
    tokenizer: str | None = None,
    reasons: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Judge a run (or a checkpoint of any format, with `data`), and write the page `output` unless it is None.

    `others` are judged by the same text. `data` is a text file or a corpus' prefix; None: what the run holds out.
    `reasons` say why a row of the report (model, vocabulary, text, batch, learning rate, time) is what it is, beside
    those that the run's folder has. `say` is told what is being done.
    Raises DataError or CheckpointError where there is nothing to judge, or nothing to judge it by.
    """
    report = judge(run, others=others, data=data, tokenizer=tokenizer, reasons=reasons, say=say)
    if output is not None:
        from castalia.report.report_page import page

        Path(output).absolute().parent.mkdir(parents=True, exist_ok=True)
        write_text(output, page(report))
    return report


def judge(
    run: str | os.PathLike[str],
    *,
    others: Sequence[str] = (),
    data: str | None = None,
    tokenizer: str | None = None,
    reasons: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """The report, without a page."""
    judged = load(open_checkpoint(os.fspath(run)), tokenizer)
    held_out = named_text(data, judged.tokenizer) if data else validation_text(judged.config.data, judged.tokenizer)
    folder = folder_of(run)
    say(f"predicting {held_out.num_tokens:,} tokens of {held_out.name}")
    groups = by_source(held_out.documents)
    parts = {name: score(judged, documents) for name, documents in groups.items()}
    whole = _together(list(parts.values()))
    bars, notes = _bars(held_out, whole, judged)
    for other in others:
        say(f"the same text by {other}")
        bar, note = _other(other, held_out)
        bars += [bar] if bar else []
        notes += note
    say("writing samples")
    samples, search = write_samples(judged, held_out)
    sources = tuple(
        SourceScore(name, part.bytes, part.loss, part.bits_per_byte, _xz(groups[name], part.bytes))
        for name, part in parts.items()
    )
    looked_at = f"{held_out.num_tokens:,} of {held_out.of_tokens:,} tokens of {held_out.name}"
    if held_out.is_validation and (warning := other_held_out(judged.checkpoint.facts.held_out, judged.config.data)):
        notes.append(warning)
    if not held_out.is_validation:
        notes.append(f"{held_out.name} was named with --data; whether the model was trained on it is not known")
    return Report(
        name=(folder or Path(run)).resolve().name,
        checkpoint=judged.checkpoint.path,
        step=judged.checkpoint.progress.step,
        sentence=_sentence(whole, bars, "held-out text" if held_out.is_validation else held_out.name),
        held_out=looked_at + (", which training leaves out" if held_out.is_validation else ""),
        score=whole,
        bars=tuple(sorted(bars, key=lambda bar: bar.bits_per_byte)),
        sources=sources if len(sources) > 1 else (),
        samples=tuple(samples),
        search=search,
        rows=tuple(_rows(judged, held_out, folder, dict(_noted(folder)) | dict(reasons or {}))),
        next=tuple(_next(str(run), judged, folder, data)),
        notes=tuple(notes),
        records=_records([folder, *map(folder_of, others)]),
    )


def folder_of(path: str | os.PathLike[str]) -> Path | None:
    """The run that a path leads to: itself, its checkpoints or one of them."""
    place = Path(path)
    return next((folder for folder in (place, place.parent, place.parent.parent) if is_run(folder)), None)


def _records(folders: Sequence[Path | None]) -> dict[str, list[dict[str, Any]]]:
    recorded = [(folder, list(read_metrics(folder))) for folder in folders if folder is not None]
    names = [folder.resolve().name for folder, _ in recorded]
    return {
        name if names.count(name) == 1 else str(folder): records  # runs in different folders may share a name
        for name, (folder, records) in zip(names, recorded, strict=True)
        if records
    }


def _together(parts: Sequence[Score]) -> Score:
    tokens, size = sum(part.tokens for part in parts), sum(part.bytes for part in parts)
    if not tokens:
        raise DataError("none of the held-out text's tokens counts; name another text: --data FILE")
    loss = sum(part.loss * part.tokens for part in parts if part.tokens) / tokens  # the loss of no tokens is NaN
    bits = [part.bits_per_byte for part in parts]
    whole = loss * tokens / (math.log(2) * size) if size and None not in bits else None
    return Score(loss, tokens, size, whole)


def _bars(held_out: HeldOut, whole: Score, judged: Judged) -> tuple[list[Bar], list[str]]:
    if whole.bits_per_byte is None:
        why = "only a part of the held-out tokens counts, so there are no bits per byte to compare"
        return [], [why]
    text = held_out.text
    bars = [
        Bar("this model", whole.bits_per_byte, "this run"),
        Bar("xz -9e", xz_bits(text) / len(text), "baseline"),
        Bar("gzip -9", gzip_bits(text) / len(text), "baseline"),
        Bar("unigram of bytes (the text's own frequencies)", byte_entropy(text), "baseline"),
    ]
    counts = token_counts(judged)
    if counts is not None:
        tokens = np.concatenate([document.tokens for document in held_out.documents])
        if int(tokens.max()) < len(counts):
            bits = token_unigram_bits(tokens, counts) / len(text)
            bars.append(Bar("unigram of tokens (frequencies in the training text)", bits, "baseline"))
    return bars, []


def token_counts(judged: Judged) -> np.ndarray | None:
    """How often the training text has each token, of its beginning; None where it is not here."""
    corpora = training_corpora(judged.config)
    if not corpora:
        return None
    counts = np.zeros(judged.model.cfg.vocab_size or judged.model.cfg.padded_vocab_size, np.int64)
    left = COUNTED_TOKENS
    for text, excluded in corpora:
        for number in np.arange(len(text)) if excluded is None else np.flatnonzero(~excluded):
            tokens = text[int(number)][:left]
            counted = np.bincount(tokens.astype(np.int64), minlength=len(counts))
            if len(counted) > len(counts):  # ids beyond the model's vocabulary: another tokenizer's text
                return None
            counts += counted
            left -= len(tokens)
            if left <= 0:
                return counts
    return counts


def _other(path: str, held_out: HeldOut) -> tuple[Bar | None, list[str]]:
    """Another run's figure, by the same text in its own tokens."""
    judged = load(open_checkpoint(path), None)
    other_score = score(judged, respelled(held_out, judged.tokenizer))
    if other_score.bits_per_byte is None:
        return None, [f"{path} predicts nothing of this text"]
    bar = Bar(path, other_score.bits_per_byte, "run")
    return bar, [f"{path} was judged by this run's held-out text; whether it was trained on it is not known"]


def _xz(documents: Sequence[Any], size: int) -> float:
    return xz_bits("".join(document.text for document in documents).encode()) / max(size, 1)


def _sentence(whole: Score, bars: Sequence[Bar], text: str) -> str:
    if whole.bits_per_byte is None:
        return f"Loss {whole.loss:.3f} nats a token on {text}."
    own, others = whole.bits_per_byte, [bar for bar in bars if bar.kind == "baseline"]
    behind = [bar for bar in others if bar.bits_per_byte <= own]
    best = min(others, key=lambda bar: bar.bits_per_byte)
    start = f"A byte of {text} takes {own:.2f} bits"
    if behind:
        return (
            f"{start}, more than {best.name} needs ({best.bits_per_byte:.2f}): it has learnt little yet. "
            "More steps, more text or another learning rate will tell more."
        )
    return f"{start}, {1 - own / best.bits_per_byte:.0%} less than {best.name} needs ({best.bits_per_byte:.2f})."


# What was chosen


def _noted(folder: Path | None) -> Mapping[str, str]:
    """Reasons that the run's folder has."""
    if folder is None or not (folder / REASONS).is_file():
        return {}
    try:
        reasons = json.loads((folder / REASONS).read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return {str(name): str(why) for name, why in reasons.items()} if isinstance(reasons, dict) else {}


def _rows(judged: Judged, held_out: HeldOut, folder: Path | None, reasons: Mapping[str, str]) -> list[Row]:
    config, model, progress = judged.config, judged.model.cfg, judged.checkpoint.progress
    sizes = count(model)
    tokens = progress.tokens or 0
    heads = f"{model.num_heads} heads" + (f", {model.kv_heads} of keys" if model.kv_heads != model.num_heads else "")
    rows = [
        Row("model", f"{model.num_layers} layers, width {model.hidden_size}, {heads}", ""),
        Row("parameters", short_number(sizes.total), _per_parameter(tokens, sizes.total)),
        Row("vocabulary", f"{model.vocab_size or model.padded_vocab_size:,} tokens", _token_bytes(held_out)),
        Row("context", f"{config.data.seq_length:,} tokens", ""),
    ]
    if tokens:
        rows.append(Row("trained on", f"{tokens:,} tokens in {progress.step:,} steps", _epochs(judged, tokens)))
    if folder is not None:
        rows += _training_rows(config, folder)
    return [row._replace(why=reasons.get(row.what, row.why)) for row in rows]


def _per_parameter(tokens: int, parameters: int) -> str:
    if not tokens:
        return ""
    return (
        f"{tokens / parameters:.1f} tokens for each; about 20 make the best of a given amount of computation "
        "(Hoffmann et al., 2022)"
    )


def _token_bytes(held_out: HeldOut) -> str:
    return f"a token of the held-out text has {len(held_out.text) / max(held_out.num_tokens, 1):.2f} bytes"


def _epochs(judged: Judged, tokens: int) -> str:
    corpora = training_corpora(judged.config)
    if not corpora:
        return ""
    each = [int(text.sizes.sum() if out is None else text.sizes[~out].sum()) for text, out in corpora]
    passes = tokens / max(sum(each), 1)
    seen = f"{passes:.1f} passes over {sum(each):,} tokens"
    return seen + (
        "; beyond about 4, the same text again teaches little (Muennighoff et al., 2023)" if passes > 4 else ""
    )


def _training_rows(config: RunConfig, folder: Path) -> list[Row]:
    records, schedule = list(read_metrics(folder)), config.schedule
    starts = [event for event in read_events(folder) if event["event"] == "start"]
    seconds = sum(record.get("seconds") or 0.0 for record in records)
    rate = f"{config.optimizer.lr:g}, {schedule.style}"
    rows = [
        Row("batch", f"{config.train.batch_size or '?'} sequences a step", ""),
        Row("learning rate", rate, f"{config.optimizer.name}, warm-up over {_warmup(config)}"),
    ]
    if seconds:
        # Tokens add up over the run, so those of the first record's step are left out, and its time with them.
        tokens = (records[-1].get("tokens") or 0) - (records[0].get("tokens") or 0)
        speed = (
            f"{tokens / max(seconds - (records[0].get('seconds') or 0.0), 1e-9):,.0f} tokens a second" if tokens else ""
        )
        rows.append(Row("time", f"{duration(seconds)} of training", speed))
    machine = next((event["machine"] for event in reversed(starts) if event.get("machine")), None)
    return rows + ([Row("machine", str(machine), "")] if machine else [])


def _warmup(config: RunConfig) -> str:
    schedule = config.schedule
    return f"{schedule.warmup_steps:,} steps" if schedule.warmup_steps is not None else f"{schedule.warmup:.0%}"


# How to continue


def _next(path: str, judged: Judged, folder: Path | None, data: str | None) -> list[Next]:
    own = shlex.quote(path)
    config, step = judged.config, judged.checkpoint.progress.step
    advice = [Next("let it write", f"castalia generate {own} --temperature 0.8 --max-tokens 200 --prompt 'Once'")]
    steps = config.train.steps
    if folder is not None and steps:
        run = shlex.quote(str(folder))
        if step < steps:
            advice.append(Next(f"train the {steps - step:,} steps that are left", f"castalia train {run}"))
        else:
            longer = f"train.steps={2 * steps} checkpoint.schedule_from=config checkpoint.other_data=true"
            advice.append(Next("train as long again, with another fall of the rate", f"castalia train {run} {longer}"))
    advice += [
        Next("judge it by a text of yours", f"castalia report {own} --data my.txt"),
        Next("teach it by examples", f"castalia finetune {own} data.train=my.jsonl"),
        Next("take it to other programs", f"castalia convert {own} {shlex.quote(path.rstrip('/') + '-hf')} --to hf"),
    ]
    return advice
