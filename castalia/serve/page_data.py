"""What the page shows of runs and checkpoints, as values of JSON. Nothing here disturbs a run that is training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from castalia.checkpoint.opener import find_steps, open_checkpoint
from castalia.config.fields import changed, values
from castalia.config.load import load_config
from castalia.config.schema import RunConfig
from castalia.data.batch_rows import batch_rows
from castalia.data.pairs import open_samples
from castalia.data.tokenizer import load_tokenizer
from castalia.errors import CastaliaError, DataError
from castalia.examine.diff import diff
from castalia.examine.inspect import report
from castalia.observe.metrics import read_events, read_metrics
from castalia.observe.run_labels import labels
from castalia.plan.run_plan import report as plan_report
from castalia.serve.catalogue import ModelEntry
from castalia.train.run_facts import collect_run_facts
from castalia.train.status import read_status

SHOWN_TEXT = 2000  # characters of a sequence


def run_list(runs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Where each run stands, and in which settings it differs from the others."""
    shown = _labels(tuple((folder, _changed(folder / "config.yml")) for folder in runs.values()))
    return [_state(name, folder) | {"label": label} for (name, folder), label in zip(runs.items(), shown, strict=True)]


@lru_cache(maxsize=4)
def _labels(runs: tuple[tuple[Path, int], ...]) -> list[str]:
    """The labels of runs whose configs were changed at these times; a page asks every few seconds."""
    return labels([folder for folder, _ in runs]) if runs else []


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def _state(name: str, folder: Path) -> dict[str, Any]:
    """The state of a run, or why it cannot be told."""
    try:
        return {**asdict(read_status(folder)), "name": name}
    except CastaliaError as error:
        return {"name": name, "folder": os.fspath(folder), "state": "unknown", "message": str(error)}


def run_facts(name: str, folder: Path) -> dict[str, Any]:
    """State, events, saved steps, and every setting with its origin."""
    config = load_config(folder / "config.yml", any_batch=True)
    marked = changed(config)
    settings = [
        {"path": path, "value": to_jsonable_python(value), "changed": path in marked,
         "origin": config.origins.get(path, "default")}
        for path, value in values(config)
    ]  # fmt: skip
    events = [{key: value for key, value in each.items() if key != "layers"} for each in read_events(folder)]
    facts = {"events": events, "steps": list(find_steps(folder)), "settings": settings, "notes": config.notes}
    return _state(name, folder) | facts


def metrics_since(folder: Path, after: int) -> dict[str, Any]:
    """The records behind a step, as columns with None for what a record lacks; `last` is the last step of all."""
    path = folder / "metrics.jsonl"
    stat = path.stat()
    records = _records(folder, stat.st_size, stat.st_mtime_ns)
    new = [record for record in records if record["step"] > after]
    names = {key: None for record in new for key, value in record.items() if isinstance(value, int | float)}
    last = records[-1]["step"] if records else 0
    return {"last": last, "columns": {key: [record.get(key) for record in new] for key in names}}


@lru_cache(maxsize=16)
def _records(folder: Path, size: int, changed_ns: int) -> list[dict[str, Any]]:
    """All records of a run; read again when the file has changed."""
    return list(read_metrics(folder))


def batch_of(folder: Path, step: int) -> list[dict[str, Any]]:
    """The sequences that a step (from 1) trains on, with the documents that they are parts of.

    Raises DataError for a step that the run does not have, or where its data are not here.
    """
    config = load_config(folder, any_batch=True)
    if not 1 <= step <= (config.train.steps or 0):
        raise DataError(f"step {step}: the run's steps are 1 to {config.train.steps}")
    named = config.tokenizer.kind or config.tokenizer.path
    tokenizer = load_tokenizer(config.tokenizer) if named else None
    rows = batch_rows(open_samples(config), step - 1, tokenizer)
    return [
        {
            "position": row["position"],
            "tokens": len(row["tokens"]),
            "documents": [{**piece, "corpus": Path(piece["prefix"]).name} for piece in row["pieces"]],
            "text": None if row["text"] is None else row["text"][:SHOWN_TEXT],
        }
        for row in rows
    ]


def inspected(entry: ModelEntry) -> dict[str, Any]:
    """What `castalia inspect` tells of a checkpoint."""
    return report(open_checkpoint(entry.path, tolerant=True, adapters=True))


def compared(a: ModelEntry, b: ModelEntry) -> dict[str, Any]:
    """What `castalia diff` tells of two checkpoints."""
    return diff(open_checkpoint(a.path), open_checkpoint(b.path)).as_json()


def planned(entry: ModelEntry) -> dict[str, Any]:
    """What `castalia plan` tells of a checkpoint's config. Raises DataError where it has none."""
    config: RunConfig | None = open_checkpoint(entry.path).config
    if config is None or config.model is None:
        raise DataError(f"{entry.name} comes without a config to plan from")
    return plan_report(config, collect_run_facts(config)).as_json()
