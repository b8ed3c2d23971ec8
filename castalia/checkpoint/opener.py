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
from castalia.checkpoint.formats import FORMATS
from castalia.checkpoint.formats.native.read import has_foreign_manifest
from castalia.checkpoint.tensors import Checkpoint
from castalia.errors import CheckpointError
from castalia.files import standing
from castalia.storage.safetensors import safe_join

STEP_FOLDER = re.compile(r"(?:global_)?step_?(\d+)")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w.-]+(/[\w.-]+)*)?")


def open_checkpoint(
    path: str | Path, *, step: int | None = None, tolerant: bool = False, adapters: bool = False, **hints: object
) -> Checkpoint:
    """Open any checkpoint; nothing but directories and headers is read.

    `step` selects one of several. Adapters are merged into their matrices, unless `adapters` asks for them as they are.
    Other hints are the reader's: `config`, `tokenizer`, `gqa_rows`, `rms_eps`, `base`; None is no hint. `tolerant`: a
    config that is of another model is told in the details instead of refused, so that the files can be looked into.
    Raises CheckpointError when there is no checkpoint, or when a hint does not apply to its format.
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
    if row.on_base:
        given["open_base"] = partial(open_checkpoint, adapters=True)
    try:
        checkpoint = _reader(name).read(folder, **given)
    except CheckpointError as error:
        if str(folder) in str(error):
            raise
        raise CheckpointError(f"{folder}: {error}") from error
    checkpoint = _agreed(checkpoint, tolerant)
    if step is not None and checkpoint.progress.step != step:
        raise CheckpointError(f"{folder} is of step {checkpoint.progress.step}, not {step}")
    return checkpoint if adapters else merged(checkpoint)


def _agreed(checkpoint: Checkpoint, tolerant: bool) -> Checkpoint:
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
    """The format of the files in a folder, or None. A config.json without weights gives way to any other format."""
    matches = (name for name in FORMATS if _reader(name).detect(Path(path)))
    first = next(matches, None)
    if first == "huggingface" and not _reader(first).has_weights(Path(path)):
        return next(matches, first)
    return first


def base_of(checkpoint: Checkpoint) -> str | None:
    """The path of the model below a checkpoint's adapters, which several runs may have trained one after another."""
    base = checkpoint.facts.base or (checkpoint.config and checkpoint.config.checkpoint.init_from)
    if not base or not os.path.exists(base):
        return base or None
    source = open_checkpoint(base, adapters=True)
    return base_of(source) if adapters_of(source) else os.path.abspath(base)


def find_folder(path: str | Path, step: int | None = None) -> Path:
    """The folder that holds a checkpoint's files."""
    folder = standing(Path(path).expanduser())
    if not folder.exists():
        if HUB_ID.fullmatch(str(path)):
            return find_folder(_cached(str(path)), step)
        raise CheckpointError(f"{path} does not exist" + _neighbours(folder))
    if folder.is_file():
        raise CheckpointError(f"{path} is a file; give the folder that holds the checkpoint: {folder.parent}")
    if (folder / "checkpoints").is_dir() and not (folder / "latest").is_file() and detect(folder) is None:
        return find_folder(folder / "checkpoints", step)
    steps = _steps(folder)
    if step is not None and (steps or (folder / "latest").is_file()):
        if step not in steps:
            raise CheckpointError(f"{folder} has no checkpoint of step {step}; {_listed(steps)}")
        return steps[step]
    if (folder / "latest").is_file():  # transformers' Trainer writes it, too, where it uses DeepSpeed
        return folder if detect(folder) == "huggingface" else _latest(folder, steps)
    if steps and detect(folder) is None:
        newest = list(steps.values())[-1]
        if detect(newest) == "native":  # only whole ones have this name, and `latest` comes after the first
            return newest
        raise CheckpointError(
            f"{folder} has no file `latest` that names the newest step; {_listed(steps)}. "
            "Name one of these folders, or the step."
        )
    return folder


def find_steps(path: str | Path) -> dict[int, Path]:
    """The folders of steps in a run or in a folder of checkpoints, in order."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{path} is no folder")
    return _steps(folder) or (_steps(folder / "checkpoints") if (folder / "checkpoints").is_dir() else {})


def _latest(folder: Path, steps: dict[int, Path]) -> Path:
    name = (folder / "latest").read_text(errors="replace").strip()
    if not name:
        raise CheckpointError(
            f"{folder / 'latest'} is empty, where the newest step's folder should be named; {_listed(steps)}. Give one "
            "of them instead, or write its name into the file"
        )
    named = standing(safe_join(folder, name))
    if not named.is_dir():
        raise CheckpointError(
            f"{folder / 'latest'} names {name!r}, but there is no such folder; {_listed(steps)}. "
            "Name one of them, or copy the missing folder."
        )
    return named


def _steps(folder: Path) -> dict[int, Path]:
    matches = ((STEP_FOLDER.fullmatch(entry.name), entry) for entry in folder.iterdir() if entry.is_dir())
    return dict(sorted((int(match[1]), entry) for match, entry in matches if match))


def _listed(steps: dict[int, Path]) -> str:
    if not steps:
        return "no step's folder is there"
    names = [path.name for path in steps.values()]
    shown = names if len(names) <= 8 else [*names[:4], "...", *names[-3:]]
    return f"there are {', '.join(shown)}"


def _nothing_found(folder: Path) -> str:
    entries = sorted(entry.name for entry in folder.iterdir())
    found = "it is empty" if not entries else f"it holds {', '.join(entries[:8])}{', ...' if len(entries) > 8 else ''}"
    if has_foreign_manifest(folder):
        found += "; its manifest.json is another program's"
    return (
        f"{folder} does not look like a checkpoint: {found}. Expected a run's folder, a folder with `latest`, a "
        "step's folder with manifest.json, NeoX's or Megatron-DeepSpeed's layer_* or mp_rank_* files, or a Hugging "
        "Face folder with config.json and weights."
    )


def _neighbours(folder: Path) -> str:
    parent = folder.parent
    if not parent.is_dir():
        return ""
    steps = _steps(parent)
    return f"; beside it, {_listed(steps)}" if steps else ""


def _cached(hub_id: str) -> Path:
    """A repository's snapshot in the local Hugging Face cache. The network is never used."""
    name, _, revision = hub_id.partition("@")
    revision = revision or "main"
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub"))).expanduser()
    repository = cache / f"models--{name.replace('/', '--')}"
    reference = safe_join(repository / "refs", revision)
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = safe_join(repository / "snapshots", commit)
    if not snapshot.is_dir():
        raise CheckpointError(
            f"{hub_id} is neither a folder here nor in the local cache {cache}. Fetch it first: "
            f"hf download {name} --revision {revision}"
        )
    return snapshot
