"""How files and folders appear under their names: written beside them, brought to disk, renamed.

What exists on the way is called `.NAME.castalia-KIND`; a folder of such a name, a workplace, holds the file MARK as
well. Nothing is ever removed that does not bear this name and, being a folder, this mark: whatever else lies beside a
checkpoint or a corpus is somebody's.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

MARK = "made-by-castalia"
NEW, REPLACED, DELETED = "new", "replaced", "deleted"  # kinds of workplaces; see `clean`
UNFINISHED = "unfinished"  # a workplace that stays until the same is begun again; its MARK says how far it is


def beside(path: Path, kind: str) -> Path:
    """The name that only this program gives, for what belongs to `path`."""
    return path.with_name(f".{path.name}.castalia-{kind}")


def behind_links(path: Path) -> Path:
    """What a link leads to, so that replacing replaces that and not the link; other paths as they are."""
    return path.resolve() if path.is_symlink() else path


def sync(path: Path) -> None:
    """Wait until a file's or folder's content is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of open files name the path, which the system tells only where it was given one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def appearing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file that has its name, with all of its content on disk, once the block has ended without an error.

    Until then what stood there before stands there. What a killed process left of the same file is removed.
    """
    path = behind_links(Path(path))
    for other in path.parent.glob(f"{escape(beside(path, NEW).name)}-*"):
        _remove_if_dead(other)
    folder = os.open(path.parent, os.O_RDONLY)  # before: whoever waits for the file may rename its folder at once
    try:
        with naming(path), _locked(beside(path, f"{NEW}-{uuid4().hex}")) as (temporary, file):
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        with naming(path):
            os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def appearing_whole(path: Path) -> Iterator[Path]:
    """The same for what other programs write: a path for them, in a workplace."""
    place = workplace(path, NEW)
    try:
        yield place / path.name
        sync(place / path.name)
        os.replace(place / path.name, path)
        sync(path.parent.absolute())  # which an error then names by more than a dot
    finally:
        remove(place)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace a file's content, or leave it as it is."""
    with appearing(path) as file:
        file.write(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """The same for a text, as UTF-8."""
    write_bytes(path, text.encode())


@contextmanager
def _locked(path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """A new file that shows, by its lock, that its process lives."""
    while True:
        with open(path, "xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists():  # else it was taken for a dead one's before it was locked
                yield path, file
                return


def lock(file: IO[Any], shared: bool = False) -> bool:
    """Hold an open file until it is closed; the system lets go of it when the process dies. False: another holds it.

    `shared`: beside others that ask so.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_if_dead(path: Path) -> None:
    with suppress(FileNotFoundError), open(path, "rb") as file:
        if lock(file):
            path.unlink()


def workplace(target: Path, kind: str) -> Path:
    """A new marked folder for what is to become, or was, `target`: its place inside is the one of the same name.

    Raises FileExistsError where another program has taken the name.
    """
    folder = beside(target, kind)
    if folder.exists() and kind != UNFINISHED:
        remove(folder)
    folder.mkdir(exist_ok=True)
    if not (folder / MARK).exists():
        _refuse_strange(folder)
        (folder / MARK).touch()
    return folder


def _refuse_strange(folder: Path) -> None:
    if any(folder.iterdir()) and not (folder / MARK).is_file():
        raise FileExistsError(17, "the name is taken by a folder that is not castalia's", str(folder))


def remove(folder: Path) -> None:
    """A workplace, with all that is in it. Raises FileExistsError for a folder that is none."""
    _refuse_strange(folder)
    clear(folder)
    (folder / MARK).unlink(missing_ok=True)  # last: what a kill leaves half removed still bears it
    folder.rmdir()


def clear(folder: Path) -> None:
    """Remove what is in a workplace."""
    for path in folder.iterdir():
        if path.name != MARK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def put_in_place(new: Path, target: Path) -> Path | None:
    """Give a folder its name. Returns the workplace, to be removed, of the one that had it, if there was one."""
    old = None
    if target.exists():
        old = workplace(target, REPLACED)
        target.rename(old / target.name)
    new.rename(target)
    sync(target.parent)
    return old


def standing(path: Path) -> Path:
    """Where a folder stands: under its name, or, while it is being replaced, in the workplace beside it."""
    old = beside(path, REPLACED)
    return old / path.name if not path.exists() and (old / MARK).is_file() and (old / path.name).exists() else path


def delete(folder: Path) -> None:
    """In two steps, because a folder that is half deleted must not look like a whole one."""
    doomed = workplace(folder, DELETED)
    folder.rename(doomed / folder.name)
    remove(doomed)


def clean(parent: Path, name: str = "*") -> None:
    """Remove what killed processes left beside `name`, or in all of the folder; undo replacing that was not done."""
    pattern = re.compile(rf"\.(.+)\.castalia-({NEW}|{REPLACED}|{DELETED})")
    for path in parent.glob(f".{name if name == '*' else escape(name)}.castalia-*"):
        match = pattern.fullmatch(path.name)
        if path.is_file():
            _remove_if_dead(path)
        elif match and ((path / MARK).is_file() or not any(path.iterdir())):
            target = parent / match[1]
            if match[2] == REPLACED and (path / match[1]).exists() and not target.exists():
                (path / match[1]).rename(target)
                sync(parent)
            remove(path)
