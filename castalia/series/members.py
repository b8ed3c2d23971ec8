"""Find the checkpoints of a series, of any formats, in the order of their steps."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from castalia.checkpoint.hub_cache import HUB_ID, cached_revisions
from castalia.checkpoint.opener import detect, find_folder, find_steps, open_checkpoint
from castalia.checkpoint.tensors import Checkpoint
from castalia.errors import CheckpointError, ConfigError
from castalia.files import standing
from castalia.train.run_folder import is_run, origin

log = logging.getLogger(__name__)

# step1000, global_step1000, step_001000, stage1-step1000-tokens5B, checkpoint-1000, iter_0001000
LABEL = re.compile(r"(?:.*[^a-z])?(?:step|checkpoint|iter)[_-]?(\d+)(?:[^\d].*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Member:
    """One checkpoint of a series: what its name says, and where it lies. It may be damaged."""

    step: int
    name: str  # of the folder or the revision
    path: Path

    def open(self, **options: Any) -> Checkpoint:
        """The checkpoint, as `open_checkpoint` gives it with these options. Raises CheckpointError."""
        return open_checkpoint(folder_of(self.path), **options)


def find_series(words: Sequence[str | Path], steps: str | None = None) -> list[Member]:
    """The checkpoints that the words name, in the order of their steps.

    One word: a run, of a branch with its trunk's steps before it; a folder with one folder for each step, a `save`
    folder of GPT-NeoX, or an id on the hub whose revisions are in the local cache, as `EleutherAI/pythia-70m@step*`.
    Several words: a checkpoint each, or a series each. `steps` chooses among them, as `parse_steps` reads it. Raises
    CheckpointError where nothing is found.
    """
    members = [member for word in words for member in _members(word)]
    if not members:
        raise CheckpointError(f"{' '.join(map(str, words))} names no checkpoints")
    members.sort(key=lambda member: member.step)
    if steps is None:
        return members
    chosen = [member for member in members if holds(parse_steps(steps), member.step)]
    if not chosen:
        raise CheckpointError(f"--steps {steps} chooses none of {len(members)} checkpoints, of {_span(members)}")
    return chosen


def open_series(*paths: str | Path, steps: str | None = None) -> list[Member]:
    """`find_series` of one path or several: each member has a step, a name and a path, and `open()`."""
    return find_series(paths, steps)


def opened(members: Sequence[Member], **options: Any) -> Iterator[tuple[int, Checkpoint]]:
    """(step, checkpoint) of each member, opened when it is asked for. Raises CheckpointError for one that cannot be."""
    return ((member.step, member.open(**options)) for member in members)


def parse_steps(text: str) -> list[tuple[int, int]]:
    """`0..512,1000,2000..` as the first and last step of each range. Raises ConfigError for anything else."""
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\.\.(\d*))?", part.strip())
        if not match:
            raise ConfigError(f"--steps {text}: {part!r} is neither a step nor a range A..B; write 0..512,1000,2000..")
        first = int(match[1])
        ranges.append((first, first if match[2] is None else int(match[2] or 10**18)))
    return ranges


def holds(ranges: Sequence[tuple[int, int]], step: int) -> bool:
    """Whether one of the ranges that `parse_steps` returned holds a step."""
    return any(first <= step <= last for first, last in ranges)


def folder_of(path: Path) -> Path:
    """The folder that holds the files of a member, which may lie in a step's folder inside a branch's folder."""
    path = standing(path)
    if path.is_dir() and detect(path) is None and not (path / "latest").is_file():
        inner = list(find_steps(path).values())
        if len(inner) == 1:
            return inner[0]
    return find_folder(path)


def _members(word: str | Path) -> list[Member]:
    folder = standing(Path(word).expanduser())
    if not folder.exists():
        name, _, pattern = str(word).partition("@")
        if not HUB_ID.fullmatch(name):
            raise CheckpointError(f"{word} does not exist")
        cached = cached_revisions(name)
        fitting = [(revision, path) for revision, path in cached.items() if fnmatchcase(revision, pattern or "*")]
        members = _labelled(fitting)
        if not members:
            raise CheckpointError(
                f"{word}: the local cache holds {', '.join(sorted(cached)[:8]) or 'no revision'} of this model, and "
                f"none names a step that fits. Fetch them first: hf download {name} --revision step1000"
            )
        return members
    if folder.is_file():
        raise CheckpointError(f"{word} is a file; give the folder that holds the checkpoints: {folder.parent}")
    members = [] if detect(folder) else _labelled([(entry.name, entry) for entry in _folders(folder)])
    if is_run(folder) and (came_from := origin(folder)):
        return _branch(folder, *came_from)
    if not members and (folder / "checkpoints").is_dir() and detect(folder) is None:
        members = _labelled([(entry.name, entry) for entry in _folders(folder / "checkpoints")])
    return members or [_single(folder)]


def _branch(run: Path, step: int, source: Path) -> list[Member]:
    """The steps of a branch, and before them those of the run that it began with, as far as that is still there."""
    own = _labelled([(entry.name, entry) for entry in _folders(run / "checkpoints")])
    trunk = source.parent.parent  # RUN/checkpoints/step_000010
    if not source.is_dir():
        log.warning("%s began with %s, which is gone: its steps until %d are left out", run, source, step)
        return own
    before = _members(trunk) if is_run(trunk) else _members(source)
    return [member for member in before if member.step <= step] + [each for each in own if each.step > step]


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]


def _labelled(named: Sequence[tuple[str, Path]]) -> list[Member]:
    matches = ((LABEL.fullmatch(name), name, path) for name, path in named)
    return [Member(int(match[1]), name, path) for match, name, path in matches if match]


def _single(folder: Path) -> Member:
    """A folder that is a checkpoint itself. Its step is what its name says, else what its files say."""
    real = find_folder(folder)
    for name in (folder.name, real.name, folder.resolve().name):
        if match := LABEL.fullmatch(name):
            return Member(int(match[1]), folder.name, folder)
    return Member(open_checkpoint(real, adapters=True).progress.step, folder.name, folder)


def _span(members: Sequence[Member]) -> str:
    return f"step {members[0].step}" if len(members) == 1 else f"steps {members[0].step} to {members[-1].step}"
