"""What has been written so far, beside the partial files, so that an interrupted preparation can be continued."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from castalia.data.indexed import DatasetWriter
from castalia.errors import DataError
from castalia.files import beside, write_text
from castalia.reading import keys, read_json

SECONDS_BETWEEN_NOTES = 5.0
KINDS = {"identity": str, "chunks": int, "items": list[int], "note": dict[str, Any]}
STATE = keys(KINDS, required=KINDS)


def identity(files: Sequence[Path], *settings: object) -> str:
    """Changes when a file is replaced or edited, by path, size and time, or when a setting changes."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    for file in files:
        found = file.stat()
        digest.update(f"\n{file.absolute()} {found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()


class Journal:
    """The journal says how many chunks are in the partial files, and a file beside each of those the sizes of its
    items. All go when the work is done or has failed, and stay when it is interrupted, however hard."""

    def __init__(self, output: str | os.PathLike[str], identity: str, writers: Sequence[DatasetWriter]):
        self.path = beside(Path(output), "journal")
        self.identity, self.writers = identity, writers
        self.sizes = [beside(Path(writer.prefix), "sizes") for writer in writers]
        self.noted = [0] * len(writers)  # items whose sizes are on disk
        self.due = time.monotonic() + SECONDS_BETWEEN_NOTES

    def restore(self) -> tuple[int, dict[str, Any]]:
        """How many chunks the partial files hold already, and what was noted with them. (0, {}) for a fresh start."""
        try:
            state = read_json(self.path, DataError, STATE)
        except DataError:  # not there, or not ours: from the start
            state = {}
        items = state["items"] if state.get("identity") == self.identity else [0] * len(self.writers)
        sizes = [_read_sizes(path)[:count] for path, count in zip(self.sizes, items, strict=True)]
        whole = [len(found) for found in sizes] == items and all(map(DatasetWriter.holds, self.writers, sizes))
        if not (any(items) and whole):
            state, sizes = {}, [found[:0] for found in sizes]
        for writer, path, found in zip(self.writers, self.sizes, sizes, strict=True):
            writer.take_up(found)
            path.write_bytes(found.tobytes())
        self.noted = [len(found) for found in sizes]
        return (state["chunks"], state["note"]) if state else (0, {})

    def note(self, chunks: int, note: dict[str, Any]) -> None:
        """Every few seconds: all that the first `chunks` chunks gave is in the writers."""
        if time.monotonic() < self.due:
            return
        for number, (writer, path) in enumerate(zip(self.writers, self.sizes, strict=True)):
            writer.flush()
            with path.open("ab") as file:
                file.write(writer.sizes[self.noted[number] :].tobytes())
                file.flush()
                os.fdatasync(file.fileno())
            self.noted[number] = len(writer.sizes)
        state = {"identity": self.identity, "chunks": chunks, "items": self.noted, "note": note}
        write_text(self.path, json.dumps(state))
        self.due = time.monotonic() + SECONDS_BETWEEN_NOTES

    def _forget(self) -> None:
        for path in (self.path, *self.sizes):
            path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, Exception):
            self._forget()


def _read_sizes(path: Path) -> np.ndarray:
    """As many as there are whole ones."""
    raw = path.read_bytes() if path.exists() else b""
    return np.frombuffer(raw[: len(raw) // 4 * 4], "i4")
