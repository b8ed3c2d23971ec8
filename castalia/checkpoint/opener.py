"""Open a checkpoint of any format from any path: a run, a folder with `latest`, a step's folder, a hub id."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from castalia.checkpoint.adapters import adapters_of, merged
from castalia.checkpoint.architecture_check import differences, refuse
from castalia.checkpoint.formats import FORMATS, TRAINER_STATE
from castalia.checkpoint.formats.native.read import has_foreign_manifest
from castalia.checkpoint.hub_cache import HUB_ID, cached_snapshot
from castalia.checkpoint.tensors import Checkpoint
from castalia.errors import CheckpointError
from castalia.files import standing
from castalia.storage.safetensors import safe_join

STEP_FOLDER = re.compile(r"(?:(?:global_)?step_?|checkpoint-)(\d+)")  # the last of the Trainer of transformers


def open_checkpoint(
    path: str | Path, *, step: int | None = None, tolerant: bool = False, adapters: bool = False, **hints: object
) -> Checkpoint:
    """Open a checkpoint of any format. Directories, headers and at most a few values are read, no whole tensors.

    `step`: which of several checkpoints; None: the latest.
    `tolerant`: let files be inspected whose config describes another model; the differences are then in
    `facts.disagreements`.
    `adapters`: keep adapters apart; otherwise they are merged into their matrices.
    `hints` are passed to the format's reader: `config`, `tokenizer`, `gqa_rows`, `rms_eps`, `base`; None: no hint.
    Raises CheckpointError when there is no checkpoint, or when its format has no use for a hint.
    """
    folder = find_folder(path, step)
    name = detect(folder)
    if name is None:
        raise CheckpointError(_nothing_found(folder))
    row = FORMATS[name]
    given: dict[str, Any] = {key: value for key, value in hints.items() if value is not None}
    if unknown := given.keys() - row.hints:
        raise CheckpointError(f"{folder} is a {name} checkpoint, for which {', '.join(sorted(unknown))} has no meaning")
    if row.tolerant:
        given["tolerant"] = tolerant
    if row.on_base:  # the reader cannot import this module, which imports it
        given["open_base"] = partial(open_checkpoint, adapters=True)
    try:
        checkpoint = _reader(name).read(folder, **given)
    except CheckpointError as error:
        if str(folder) in str(error):  # every error names the folder, once
            raise
        raise CheckpointError(f"{folder}: {error}") from error
    checkpoint = _agreed(checkpoint, tolerant)
    if step is not None and checkpoint.progress.step != step:
        raise CheckpointError(f"{folder} is of step {checkpoint.progress.step}, not {step}")
    return checkpoint if adapters else merged(checkpoint)


def _agreed(checkpoint: Checkpoint, tolerant: bool) -> Checkpoint:
    """Check the tensors against the architecture. Raises CheckpointError for differences, unless `tolerant`."""
    lines = differences(checkpoint)
    if not tolerant:
        refuse(checkpoint, lines)
    if not lines:
        return checkpoint
    facts = replace(checkpoint.facts, disagreements=(*checkpoint.facts.disagreements, *lines))
    return replace(checkpoint, facts=facts)


def _reader(name: str) -> ModuleType:
    """The module with a format's `detect` and `read`, imported when a folder is looked at."""
    return import_module(f"{FORMATS[name].package}.read")


def detect(path: str | Path) -> str | None:
    """The name of the format of the files in a folder; None for no format that we know.

    A folder without the weights of a format that may lack them counts as another format's if it has its files.
    """
    matches = (name for name in FORMATS if _reader(name).detect(Path(path)))
    first = next(matches, None)
    if first is not None and FORMATS[first].weights_optional and not _reader(first).has_weights(Path(path)):
        return next(matches, first)
    return first


def base_of(checkpoint: Checkpoint) -> str | None:
    """The path of the model below a checkpoint's adapters, which several runs may have trained one after another."""
    # A PEFT folder names the model; a run of ours was started from it.
    base = checkpoint.facts.base or (checkpoint.config and checkpoint.config.checkpoint.init_from)
    if not base or not os.path.exists(base):
        return base or None
    source = open_checkpoint(base, adapters=True)
    return base_of(source) if adapters_of(source) else os.path.abspath(base)


def find_folder(path: str | Path, step: int | None = None) -> Path:
    """The folder that holds a checkpoint's files, from the path of a run, a folder of steps, a step or a hub id.

    Raises CheckpointError where there is none, or where it is not clear which step is meant.
    """
    folder = standing(Path(path).expanduser())
    if not folder.exists():
        if HUB_ID.fullmatch(str(path)):
            return find_folder(cached_snapshot(str(path)), step)
        raise CheckpointError(f"{path} does not exist" + _neighbours(folder))
    if folder.is_file():
        if detect(folder) is not None:
            return folder
        raise CheckpointError(f"{path} is a file; give the folder that holds the checkpoint: {folder.parent}")
    # A run's folder, unless it is a checkpoint itself, or a folder of steps that has a folder of this name.
    if (folder / "checkpoints").is_dir() and not (folder / "latest").is_file() and detect(folder) is None:
        return find_folder(folder / "checkpoints", step)
    steps = _steps(folder)
    if step is not None and (steps or (folder / "latest").is_file()):
        if step not in steps:
            raise CheckpointError(f"{folder} has no checkpoint of step {step}; {_step_names(steps)}")
        return steps[step]
    if (folder / "latest").is_file():  # the Trainer of transformers writes `latest` too, when it uses DeepSpeed
        return folder if detect(folder) == "huggingface" else _latest_step(folder, steps)
    if steps and detect(folder) is None:
        newest = list(steps.values())[-1]
        if detect(newest) == "native":  # only complete ones have this name; `latest` is written after the first of them
            return newest
        if complete := [place for place in steps.values() if (place / TRAINER_STATE).is_file()]:
            return complete[-1]
        raise CheckpointError(
            f"{folder} has no file `latest` that names the newest step; {_step_names(steps)}. "
            "Name one of these folders, or the step."
        )
    return folder


def find_steps(path: str | Path) -> dict[int, Path]:
    """The step folders of a run or of a folder of checkpoints, in order. Raises CheckpointError without a folder."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{path} is not a folder")
    return _steps(folder) or (_steps(folder / "checkpoints") if (folder / "checkpoints").is_dir() else {})


def _latest_step(folder: Path, steps: dict[int, Path]) -> Path:
    name = (folder / "latest").read_text(errors="replace").strip()
    if not name:
        raise CheckpointError(
            f"{folder / 'latest'} is empty, where the newest step's folder should be named; {_step_names(steps)}. Give "
            "one of them instead, or write its name into the file"
        )
    named = standing(safe_join(folder, name))
    if not named.is_dir():
        raise CheckpointError(
            f"{folder / 'latest'} names {name!r}, but there is no such folder; {_step_names(steps)}. "
            "Name one of them, or copy the missing folder."
        )
    return named


def _steps(folder: Path) -> dict[int, Path]:
    matches = ((STEP_FOLDER.fullmatch(entry.name), entry) for entry in folder.iterdir() if entry.is_dir())
    return dict(sorted((int(match[1]), entry) for match, entry in matches if match))


def _step_names(steps: dict[int, Path]) -> str:
    if not steps:
        return "no step's folder is there"
    names = [path.name for path in steps.values()]
    shown = names if len(names) <= 8 else [*names[:4], "...", *names[-3:]]
    return f"there are {', '.join(shown)}"


def _nothing_found(folder: Path) -> str:
    entries = sorted(entry.name for entry in folder.iterdir())
    content = (
        "it is empty" if not entries else f"it holds {', '.join(entries[:8])}{', ...' if len(entries) > 8 else ''}"
    )
    if has_foreign_manifest(folder):
        content += "; its manifest.json is another program's"
    return (
        f"{folder} does not look like a checkpoint: {content}. Expected a run's folder, a folder with `latest`, a "
        "step's folder with manifest.json, NeoX's or Megatron-DeepSpeed's layer_* or mp_rank_* files, or a Hugging "
        "Face folder with config.json and weights."
    )


def _neighbours(folder: Path) -> str:
    parent = folder.parent
    if not parent.is_dir():
        return ""
    steps = _steps(parent)
    return f"; beside it, {_step_names(steps)}" if steps else ""
