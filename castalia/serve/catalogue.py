"""The names by which checkpoints are asked for: `run@1000`, `run@latest`, or that of a folder."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from castalia.checkpoint.opener import detect, find_folder, find_steps, open_checkpoint
from castalia.checkpoint.tensors import Checkpoint
from castalia.errors import CheckpointError, ConfigError

FRESH_SECONDS = 1.0  # for which what was found is not looked for again
DEPTH = 4  # folders below a given one that are looked into
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class ModelEntry:
    """A checkpoint that can be asked for."""

    name: str
    path: Path  # the folder of its files
    source: str  # the name of the run or the folder that it belongs to
    step: int | None = None  # None: the folder has one checkpoint, and no step in its name
    base: str | None = None  # the model below an adapter


def open_entry(entry: ModelEntry) -> Checkpoint:
    """The checkpoint, with an adapter on its base. Raises CheckpointError."""
    return open_checkpoint(entry.path, base=entry.base) if entry.base else open_checkpoint(entry.path)


class Catalogue:
    """What lies below the given paths. Folders are looked at anew, once in a second at most."""

    def __init__(self, paths: Sequence[str], adapters: Mapping[str, str] | None = None) -> None:
        """`adapters`: folders of PEFT's by name. Raises CheckpointError where a path holds nothing to serve."""
        self.paths = [find_root(path) for path in paths]
        self.adapters = {name: str(find_folder(path)) for name, path in (adapters or {}).items()}
        self.known: set[Path] = set()  # folders that were seen to hold a checkpoint
        self.hidden: set[str] = set()  # names that others had before
        self.found: tuple[float, dict[str, Path], list[ModelEntry]] | None = None  # when, and what
        if not self.models() and not self.runs():
            raise CheckpointError(f"{', '.join(paths)}: neither a checkpoint nor a run was found there")
        if self.hidden:
            raise ConfigError(
                f"{', '.join(sorted(self.hidden))}: several of what is served have this name; serve a folder above them"
            )

    def folders(self) -> dict[str, Path]:
        """The runs, folders of steps and single checkpoints, by name; those in progress without a checkpoint, too."""
        return self._look()[0]

    def runs(self) -> dict[str, Path]:
        """The folders with a record of metrics, by name."""
        return {name: folder for name, folder in self.folders().items() if (folder / METRICS).is_file()}

    def models(self) -> list[ModelEntry]:
        """Every checkpoint, in the order of folders and steps; `NAME@latest` is understood besides."""
        return self._look()[1]

    def _look(self) -> tuple[dict[str, Path], list[ModelEntry]]:
        now = time.monotonic()
        if self.found is None or now - self.found[0] > FRESH_SECONDS:
            folders: dict[str, Path] = {}
            for root in self.paths:
                for folder in _below(root, DEPTH):
                    name = root.name if folder == root else str(folder.relative_to(root)).replace(os.sep, "/")
                    if folders.setdefault(name, folder) != folder or name in self.adapters:
                        self.hidden.add(name)
            self.found = now, folders, self._entries(folders)
        return self.found[1], self.found[2]

    def _entries(self, folders: Mapping[str, Path]) -> list[ModelEntry]:
        entries = []
        for name, folder in folders.items():
            if steps := find_steps(folder):
                named = [ModelEntry(f"{name}@{step}", path, name, step) for step, path in steps.items()]
            else:
                named = [ModelEntry(name, folder, name)]
            entries += [entry for entry in named if self._is_checkpoint(entry.path)]
        only = entries[-1].path if len({entry.source for entry in entries}) == 1 else None
        base = str(only) if only else None
        return [*entries, *(ModelEntry(name, Path(path), name, None, base) for name, path in self.adapters.items())]

    def _is_checkpoint(self, folder: Path) -> bool:
        if folder not in self.known and detect(folder) is not None:
            self.known.add(folder)
        return folder in self.known

    def find(self, name: str) -> ModelEntry | None:
        """The checkpoint of this name, which is looked up among the names and never opened as a path.

        `NAME` and `NAME@latest` mean the newest step of a run. None for an unknown name.
        """
        entries = self.models()
        source, _, step = name.rpartition("@")
        if not source or step != "latest":
            source = name
        exact = next((entry for entry in entries if entry.name == name), None)
        return exact or next((entry for entry in reversed(entries) if entry.source == source), None)


def find_root(path: str) -> Path:
    """An existing folder from a path or the id of a model on the hub. Raises CheckpointError for anything else."""
    folder = Path(path).expanduser()
    return folder.resolve() if folder.is_dir() else find_folder(path)


def _below(folder: Path, depth: int) -> Iterator[Path]:
    """The runs, folders of steps and checkpoints at a folder or below it; not what lies inside of one."""
    try:
        found = is_run(folder) or bool(find_steps(folder)) or detect(folder) is not None
        inner = [] if found or not depth else [each for each in folder.iterdir() if not each.name.startswith(".")]
        inner = sorted(entry for entry in inner if entry.is_dir())
    except (OSError, CheckpointError):
        if depth == DEPTH:
            raise
        return  # gone since it was listed, or not for this user to read; the others are served
    if found:
        yield folder
    for entry in inner:
        yield from _below(entry, depth - 1)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, even if it has saved nothing so far."""
    return (folder / METRICS).is_file() or (folder / "checkpoints").is_dir()
