"""A disk that fails on demand: every operation that changes files below a folder is counted, and one of them is fatal.

kill      the process is killed before operation n
torn      operation n, a write, gets half of its bytes to the file; then the process is killed
power     as kill, and what was not synced is lost: files end where their last fsync left them
full      from operation n on nothing can be made or written: ENOSPC
readonly  from operation n on nothing can be changed: EROFS
gone      operation n finds its path gone, once: ENOENT
SIGTERM, SIGINT, ...   comes to all ranks before operation n, once
SIGSTOP   comes to this rank alone

Or nothing fails, and `keep` gets each state of the folder that `kill`, `torn` and `power` would have left.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import hashlib
import io
import json
import os
import pathlib
import signal
import stat
import threading
from pathlib import Path
from typing import Any

ERRORS = {"full": errno.ENOSPC, "readonly": errno.EROFS, "gone": errno.ENOENT}
GROWING = ("open", "write", "mkdir", "symlink", "link")  # what needs room
PLAIN = ("mkdir", "rmdir", "unlink", "remove", "truncate", "symlink", "rename", "replace", "link")
OF_FILES = ("fsync", "fdatasync", "ftruncate", "write", "pwrite")  # by descriptor


State = dict[str, tuple[str, int, int]]  # path -> (file of content, "-> target" or "" for a folder; mode; mtime in ns)


class Disk:
    """`operations`: what was done, as (kind, path below the folder)."""

    def __init__(self, folder: Path, how: str = "", number: int | None = None, keep: str = "") -> None:
        self.folder, self.how, self.number, self.keep = str(folder.resolve()) + "/", how, number, keep
        self.states: dict[str, State] = {}
        self.moments: list[tuple[str, int, str]] = []  # (how, number, key of its state)
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

    def count(self, kind: str, path: Any, dir_fd: int | None = None, data: Any = None) -> None:
        """To be called before the operation. `data`: what it writes; then `path` is a descriptor."""
        name = self.below(path, dir_fd)
        if name is None:
            return
        with self.lock:
            self.operations.append((kind, name))
            here = len(self.operations)
            if self.keep:
                self._keep_states(here, path if data is not None else None, data)
            if self.number is None or here < self.number:
                return
            if self.how.startswith("SIG"):
                if here == self.number:
                    to = os.getpid() if self.how == "SIGSTOP" else -os.getpgid(0)
                    os.kill(to, getattr(signal, self.how))
                return
            if self.how in ERRORS:
                if self.how == "gone" and (here > self.number or kind in ("unlink", "rmdir")):  # those want it gone
                    return
                if self.how == "full" and kind not in GROWING:
                    return
                named = () if isinstance(path, int) else (self.folder + name,)  # as the system does
                raise OSError(ERRORS[self.how], os.strerror(ERRORS[self.how]), *named)
            if self.how == "torn" and data is not None:
                self.real["write"](path, half_of(data))
            if self.how == "power":
                self._lose()
            os.kill(os.getpid(), signal.SIGKILL)

    def end(self) -> None:
        """To be called when all is done: the power may be cut then, too."""
        if self.how == "power" and self.number == len(self.operations) + 1:
            self._lose()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.keep:
            self._keep_states(len(self.operations) + 1)
            with self.real_open(f"{self.keep}/states.json", "w") as file:
                json.dump({"states": self.states, "moments": self.moments}, file)

    def _keep_states(self, number: int, torn: int | None = None, data: Any = None) -> None:
        """Before operation `number`, which may write to a descriptor."""
        found = self._look()
        kept = {"kill": {path: content for path, (content, _) in found.items()}}
        kept["power"] = {
            path: content[: self.synced[key][1]] if (key := (status.st_dev, status.st_ino)) in self.synced else content
            for path, (content, status) in found.items()
        }
        if torn is not None:
            whole, status = kept["kill"], os.fstat(torn)
            at = os.lseek(torn, 0, os.SEEK_CUR)
            at = status.st_size if fcntl.fcntl(torn, fcntl.F_GETFL) & os.O_APPEND else at
            part = bytes(half_of(data))
            kept["torn"] = {
                path: content[:at] + part + content[at + len(part) :]
                if os.path.samestat(found[path][1], status)
                else content
                for path, content in whole.items()
            }
        for how, contents in kept.items():
            names = {path: self._keep_content(content) for path, content in contents.items()}
            key = hashlib.blake2b(repr(sorted(names.items())).encode(), digest_size=8).hexdigest()
            if key not in self.states:
                statuses = {path: status for path, (_, status) in found.items()}
                self.states[key] = {
                    p: (name, statuses[p].st_mode, statuses[p].st_mtime_ns) for p, name in names.items()
                }
            self.moments.append((how, number, key))

    def _keep_content(self, content: bytes | str) -> str:
        if isinstance(content, str):
            return content
        name = hashlib.blake2b(content, digest_size=8).hexdigest()
        if not os.path.exists(f"{self.keep}/{name}"):
            with self.real_open(f"{self.keep}/{name}", "wb") as file:
                file.write(content)
        return name

    def _look(self) -> dict[str, tuple[Any, os.stat_result]]:
        """All that lies in the folder, at one moment, whatever other ranks do."""
        while True:
            try:
                before, found = self._statuses(), {}
                for path, status in before.items():
                    if stat.S_ISREG(status.st_mode):
                        with self.real_open(self.folder + path, "rb") as file:
                            found[path] = file.read(), status
                    else:
                        link = stat.S_ISLNK(status.st_mode)
                        found[path] = f"-> {os.readlink(self.folder + path)}" if link else "", status
                if self._statuses() == before:
                    return found
            except FileNotFoundError:
                pass

    def _statuses(self) -> dict[str, os.stat_result]:
        walked = ((place, name) for place, *names in os.walk(self.folder) for each in names for name in each)
        paths = [os.path.join(place, name) for place, name in walked]
        return {path.removeprefix(self.folder): os.lstat(path) for path in paths}

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
            self.count(name, descriptor, data=rest[0] if name == "write" else None)
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
        self.disk.count("write", self.fileno(), data=data)
        return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        self.disk.count("truncate", self.fileno())
        return super().truncate(size)


def half_of(data: Any) -> memoryview:
    whole = memoryview(data).cast("B")
    return whole[: len(whole) // 2]
