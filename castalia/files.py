"""Atomic creation, replacement and removal of files and folders.

New content is written next to its target, synced to disk and renamed, so that under a target's name there is always
either the old or the complete new content. Temporary files and folders are called `.NAME.castalia-KIND`. A temporary
folder, called a workplace, also contains the file MARK. Nothing is ever removed that lacks this name or, if it is a
folder, this mark: other files next to a checkpoint or a corpus belong to somebody else.
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
UNFINISHED = "unfinished"  # kept until the same work is started again; its MARK records the progress


def beside(path: Path, kind: str) -> Path:
    """The temporary name next to `path` that only this program uses."""
    return path.with_name(f".{path.name}.castalia-{kind}")


def behind_links(path: Path) -> Path:
    """The target of a symbolic link, so that the target is replaced and not the link; other paths unchanged."""
    return path.resolve() if path.is_symlink() else path


def sync(path: Path) -> None:
    """Flush a file or folder to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an OSError that has none, as those of operations on open files do."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def appearing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file that gets its name, with its content synced to disk, when the block ends without an error.

    Until then, and after an error, `path` keeps its old content. Temporary files that a killed process left for the
    same path are removed. Raises OSError with the path in it.
    """
    path = behind_links(Path(path))
    for other in path.parent.glob(f"{escape(beside(path, NEW).name)}-*"):
        _remove_if_dead(other)
    # Opened before the file appears, because a process that waits for the file may rename the folder immediately.
    folder = os.open(path.parent, os.O_RDONLY)
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
    """The same for a file that a library writes by its path: yields a path inside a workplace."""
    place = workplace(path, NEW)
    try:
        yield place / path.name
        sync(place / path.name)
        os.replace(place / path.name, path)
        sync(path.parent.absolute())  # absolute, so that an error does not name it "."
    finally:
        remove(place)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace the content of a file atomically, or leave the file as it is."""
    with appearing(path) as file:
        file.write(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace the content of a file atomically by a text in UTF-8."""
    write_bytes(path, text.encode())


@contextmanager
def _locked(path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """A new file whose lock shows that the process which writes it is alive."""
    while True:
        with open(path, "xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists():  # if not, another process removed it as abandoned before it was locked
                yield path, file
                return


def lock(file: IO[Any], shared: bool = False) -> bool:
    """Lock an open file until it is closed or the process dies. False if another process holds the lock.

    `shared`: a lock that several processes may hold, if all of them ask for a shared one.
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
    """A new marked folder next to `target`, in which the old or new target has the same name as outside.

    Raises FileExistsError if a folder of this name exists that is not marked.
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
        raise FileExistsError(17, "this name belongs to a folder that castalia did not make", str(folder))


def remove(folder: Path) -> None:
    """Remove a workplace and its content. Raises FileExistsError for a folder that is not a workplace."""
    _refuse_strange(folder)
    clear(folder)
    (folder / MARK).unlink(missing_ok=True)  # last, so that a half-removed workplace still has it
    folder.rmdir()


def clear(folder: Path) -> None:
    """Remove the content of a workplace, except its mark."""
    for path in folder.iterdir():
        if path.name != MARK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def put_in_place(new: Path, target: Path) -> Path | None:
    """Rename a folder or a file to `target`.

    Returns the workplace of the folder that it replaces, if any, for removal; a file is replaced at once.
    """
    old = None
    if target.exists() and not target.is_file():
        old = workplace(target, REPLACED)
        target.rename(old / target.name)
    new.rename(target)
    sync(target.parent)
    return old


def standing(path: Path) -> Path:
    """Where a folder is: under its name or, while it is being replaced, in its workplace."""
    if path.exists():  # as the current folder does, which has no name
        return path
    old = beside(path, REPLACED)
    return old / path.name if (old / MARK).is_file() and (old / path.name).exists() else path


def delete(folder: Path) -> None:
    """Delete a folder in two steps, so that a half-deleted folder never looks like a complete one."""
    doomed = workplace(folder, DELETED)
    folder.rename(doomed / folder.name)
    remove(doomed)


def clean(parent: Path, name: str = "*") -> None:
    """Remove what killed processes left for `name`, or for every name; undo replacements that were not completed."""
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
