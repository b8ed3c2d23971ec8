"""A disk that fails on demand: every operation that changes files below a folder is counted, and one of them is fatal.

kill      the process is killed before operation n
torn      operation n, a write, gets half of its bytes to the file; then the process is killed
power     as kill, and what was not synced is lost: files end where their last fsync left them
full      from operation n on nothing can be made or written: ENOSPC
readonly  from operation n on nothing can be changed: EROFS
gone      operation n finds its path gone, once: ENOENT
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import pathlib
import signal
import threading
from pathlib import Path
from typing import Any

ERRORS = {"full": errno.ENOSPC, "readonly": errno.EROFS, "gone": errno.ENOENT}
GROWING = ("open", "write", "mkdir", "symlink", "link")  # what needs room
PLAIN = ("mkdir", "rmdir", "unlink", "remove", "truncate", "symlink", "rename", "replace", "link")
OF_FILES = ("fsync", "fdatasync", "ftruncate", "write", "pwrite")  # by descriptor


class Disk:
    """`operations`: what was done, as (kind, path below the folder)."""

    def __init__(self, folder: Path, how: str = "", number: int | None = None) -> None:
        self.folder, self.how, self.number = str(folder.resolve()) + "/", how, number
        self.operations: list[tuple[str, str]] = []
        self.synced: dict[tuple[int, int], tuple[int, int]] = {}  # inode -> descriptor of our own, size on disk
        self.lock = threading.RLock()
        self.real = {name: getattr(os, name) for name in (*PLAIN, *OF_FILES, "open")}
        self.real_open = builtins.open

    def attach(self) -> None:
        """For the rest of this process's life."""
        accessor: Any = getattr(pathlib, "_NormalAccessor", None)  # Python 3.10's has taken the functions already
        for name in (*PLAIN, *OF_FILES, "open"):
            function = self._by_descriptor(name) if name in OF_FILES else self._by_path(name)
            setattr(os, name, function)
            if accessor and hasattr(accessor, name) and name != "open":
                setattr(accessor, name, staticmethod(function))
        builtins.open = io.open = self._open  # type: ignore[assignment]
        if accessor:
            accessor.open = staticmethod(self._open)

    def below(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path below the folder, or None for one elsewhere."""
        if isinstance(path, int):
            whole = os.readlink(f"/proc/self/fd/{path}")
        else:
            start = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
            whole = os.path.normpath(os.path.join(start, os.fsdecode(path)))
        inside = (whole + "/").startswith(self.folder)
        return (whole.removeprefix(self.folder) if whole + "/" != self.folder else ".") if inside else None

    def count(self, kind: str, path: Any, dir_fd: int | None = None, tear: Any = None) -> None:
        """To be called before the operation."""
        name = self.below(path, dir_fd)
        if name is None:
            return
        with self.lock:
            self.operations.append((kind, name))
            here = len(self.operations)
            if self.number is None or here < self.number:
                return
            if self.how in ERRORS:
                if self.how == "gone" and (here > self.number or kind in ("unlink", "rmdir")):  # those want it gone
                    return
                if self.how == "full" and kind not in GROWING:
                    return
                named = () if isinstance(path, int) else (self.folder + name,)  # as the system does
                raise OSError(ERRORS[self.how], os.strerror(ERRORS[self.how]), *named)
            if self.how == "torn" and tear is not None:
                tear()
            if self.how == "power":
                self._lose()
            os.kill(os.getpid(), signal.SIGKILL)

    def end(self) -> None:
        """To be called when all is done: the power may be cut then, too."""
        if self.how == "power" and self.number == len(self.operations) + 1:
            self._lose()
            os.kill(os.getpid(), signal.SIGKILL)

    def _lose(self) -> None:
        for descriptor, size in self.synced.values():
            if os.fstat(descriptor).st_size > size:
                self.real["ftruncate"](descriptor, size)

    def _by_path(self, name: str) -> Any:
        real = self.real[name]

        def changed(path: Any, *rest: Any, **options: Any) -> Any:
            if name == "open":
                flags = rest[0] if rest else options["flags"]
                if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                    self.count("open", path, options.get("dir_fd"))
            else:
                self.count(name, path, options.get("dir_fd"))
            return real(path, *rest, **options)

        return changed

    def _by_descriptor(self, name: str) -> Any:
        real = self.real[name]

        def changed(descriptor: int, *rest: Any) -> Any:
            def half() -> None:
                self.real["write"](descriptor, memoryview(rest[0]).cast("B")[: len(rest[0]) // 2])

            self.count(name, descriptor, tear=half if name == "write" else None)
            result = real(descriptor, *rest)
            if name in ("fsync", "fdatasync"):
                self._is_synced(descriptor)
            return result

        return changed

    def _is_synced(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        key = status.st_dev, status.st_ino
        if key in self.synced:
            self.synced[key] = self.synced[key][0], status.st_size

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **options: Any) -> Any:
        writes = set(mode) & set("wax+") and not isinstance(file, int) and self.below(file) is not None
        if not writes:
            return self.real_open(file, mode, buffering, *rest, **options)
        self.count("open", file)
        raw = Raw(file, mode.replace("b", "").replace("t", ""))
        raw.disk = self
        status = os.fstat(raw.fileno())
        key = status.st_dev, status.st_ino
        if key not in self.synced:
            self.synced[key] = self.real["open"](f"/proc/self/fd/{raw.fileno()}", os.O_RDWR), status.st_size
        elif "w" in mode:
            self.synced[key] = self.synced[key][0], 0
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)  # type: ignore[arg-type]
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, *rest, line_buffering=buffering == 1, **options)
        text.mode = mode  # type: ignore[misc]
        return text


class Raw(io.FileIO):
    disk: Disk

    def write(self, data: Any) -> int:
        def half() -> None:
            io.FileIO.write(self, memoryview(data).cast("B")[: len(data) // 2])

        self.disk.count("write", self.fileno(), tear=half)
        return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        self.disk.count("truncate", self.fileno())
        return super().truncate(size)
