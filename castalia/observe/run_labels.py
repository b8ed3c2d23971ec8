"""Runs that are drawn together: those below a folder, their records, and names that say in what they differ."""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from castalia.config.fields import values
from castalia.config.load import load_config
from castalia.errors import ConfigError, DataError
from castalia.observe.curves import Records
from castalia.observe.metrics import read_metrics

TOLD = 3  # differences in a label
SHOWN = 24  # letters of a value
# Settings without which runs are told apart: places, which change nothing that is learnt, and what a run itself notes.
UNTOLD = ("checkpoint.", "log.", "data.cache_dir", "data.pass_multiple", "train.earlier_batches")


def runs_below(path: str | Path) -> list[Path]:
    """The run in a folder, or all below it, in the order of their names. Raises DataError where there is none."""
    folder = Path(path)
    if (folder / "metrics.jsonl").is_file():
        return [folder]
    below = sorted(file.parent for file in folder.rglob("metrics.jsonl"))
    if not below:
        raise DataError(f"{path} holds no metrics.jsonl, nor does any folder below it; give the folder of a run")
    return below


def labels(runs: Sequence[Path]) -> list[str]:
    """A label for each run: its folder's name, and the settings whose values are not the same in all of them.

    Those that tell most runs apart come first.
    """
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):  # equal names in different folders
        names = [str(run) for run in runs]
    settings = [_settings(run) for run in runs]
    known = settings[0] if all(settings) else {}
    kinds = {path: len({str(found.get(path)) for found in settings}) for path in known}
    differing = sorted((path for path in known if kinds[path] > 1), key=lambda path: -kinds[path])
    return [": ".join([name, *_told(found, differing)]) for name, found in zip(names, settings, strict=True)]


def _settings(run: Path) -> dict[str, Any]:
    """Values by path; none of a run whose config is not here, or is another version's: its name must do."""
    try:
        settings = list(values(load_config(run / "config.yml", any_batch=True)))
    except ConfigError:
        return {}
    return {path: _content(run, path, value) for path, value in settings if not path.startswith(UNTOLD)}


RUN = "RUN"  # in place of a run's own folder, whose name its label has already


def _content(run: Path, path: str, value: Any) -> Any:
    """The value, in whose paths and names the run's folder counts as the same for all runs.

    Each run has its own copy of the tokenizer: equal copies are equal, others are told by a digest.
    """
    copy = run / "tokenizer"
    if path != "tokenizer.path" or value is None or not copy.is_dir():
        return _without_folder(run, value) if isinstance(value, str) else value
    contents = b"".join(file.read_bytes() for file in sorted(copy.iterdir()) if file.is_file())
    return f"digest {blake2b(contents, digest_size=4).hexdigest()}"


def _without_folder(run: Path, value: str) -> str:
    whole, name = str(run.resolve()), run.resolve().name
    text = RUN + value.removeprefix(whole) if f"{value}/".startswith(f"{whole}/") else value
    return "/".join(RUN if part == name else part for part in text.split("/"))


def _told(settings: dict[str, Any], differing: Sequence[str]) -> list[str]:
    parts = [f"{path} {_text(settings[path])}" for path in differing[:TOLD] if path in settings]
    more = [f"{len(differing) - TOLD} more"] if len(differing) > TOLD else []
    return [", ".join(parts + more)] if parts else []


def _text(value: Any) -> str:
    text = "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    if len(text) <= SHOWN:
        return text
    return f"...{text[3 - SHOWN :]}" if "/" in text else f"{text[: SHOWN - 3]}..."  # of paths the end says more


def records_of(folders: list[Path]) -> Records:
    """The records of runs, by labels that say in what they differ."""
    return {name: list(read_metrics(folder)) for name, folder in zip(labels(folders), folders, strict=True)}


def default_picture(folders: list[Path]) -> Path:
    """`loss.png` in a run's folder; of several runs `losses.png` in the folder that has them all."""
    if len(folders) == 1:
        return folders[0] / "loss.png"
    return Path(os.path.relpath(os.path.commonpath([folder.resolve() for folder in folders]))) / "losses.png"
