"""A journal beside the partial files of a preparation, which allows an interrupted one to be continued."""

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

from castalia.data.dataset_writer import DatasetWriter
from castalia.data.remote_files import RemoteFile
from castalia.errors import DataError
from castalia.files import beside, write_text
from castalia.reading import keys, read_json

SECONDS_BETWEEN_NOTES = 5.0
KINDS = {"identity": str, "chunks": int, "items": list[int], "note": dict[str, Any]}
STATE = keys(KINDS, required=KINDS)


def identity(files: Sequence[Path | RemoteFile], *settings: object) -> str:
    """A digest of the path, size and time of each file and of the settings, which changes with any of them."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    for file in files:
        status = file.stat()
        digest.update(f"\n{file.absolute()} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


class Journal:
    """Notes of how many chunks of the input are in the partial files, and of the sizes of the items there.

    Its files are removed when the `with` block ends or fails. They stay after an interruption, even after SIGKILL.
    """

    def __init__(self, output: str | os.PathLike[str], identity: str, writers: Sequence[DatasetWriter]):
        self.path = beside(Path(output), "journal")
        self.identity, self.writers = identity, writers
        self.sizes = [beside(Path(writer.prefix), "sizes") for writer in writers]
        self.noted = [0] * len(writers)  # items whose sizes are on disk
        self.due = time.monotonic() + SECONDS_BETWEEN_NOTES

    def restore(self) -> tuple[int, dict[str, Any]]:
        """The number of chunks that the partial files already hold, and what was noted with them.

        (0, {}) for a fresh start, which also follows where the notes are of other files or settings.
        """
        try:
            state = read_json(self.path, DataError, STATE)
        except DataError:  # missing, or not a journal: start from the beginning
            state = {}
        items = state["items"] if state.get("identity") == self.identity else [0] * len(self.writers)
        sizes = [_read_sizes(path)[:count] for path, count in zip(self.sizes, items, strict=True)]
        complete = [len(written) for written in sizes] == items
        if not (any(items) and complete and all(map(DatasetWriter.holds, self.writers, sizes))):
            state, sizes = {}, [written[:0] for written in sizes]
        for writer, path, written in zip(self.writers, self.sizes, sizes, strict=True):
            writer.take_up(written)
            path.write_bytes(written.tobytes())
        self.noted = [len(written) for written in sizes]
        return (state["chunks"], state["note"]) if state else (0, {})

    def note(self, chunks: int, note: dict[str, Any]) -> None:
        """Note that the writers hold the first `chunks` chunks. Does something every few seconds only."""
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
    """The sizes in a file, without an incomplete one at its end."""
    raw = path.read_bytes() if path.exists() else b""
    return np.frombuffer(raw[: len(raw) // 4 * 4], "i4")
