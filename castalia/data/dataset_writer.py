"""Writes a corpus, PREFIX.bin and PREFIX.idx, document by document."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from types import TracebackType
from typing import IO

import numpy as np

from castalia.data.indexed import CODES, MAGIC, bin_path, idx_path
from castalia.errors import DataError
from castalia.files import appearing, behind_links, beside, lock, naming


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that GPT-NeoX writes for a vocabulary: u16 under 65500 entries, else i32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class DatasetWriter:
    """Writes a corpus under temporary names, which become `PREFIX.bin` and `PREFIX.idx` when the `with` block ends.

    After an error nothing is left. Only one process at a time may write a prefix: a second one gets a DataError. The
    remains of a killed process are overwritten, unless `resumable`: then `take_up` says how much of them is valid, and
    an interruption leaves them in place again.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: np.dtype | type | str, *, resumable: bool = False):
        self.prefix, self.resumable = os.fspath(prefix), resumable
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.sizes = array("i")
        self.documents = array("q", [0])
        self.num_tokens = 0
        self.published = False
        self._bin = beside(behind_links(bin_path(self.prefix)), "partial")
        self._bin.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._bin.open("ab")  # creates the file, or leaves it as it is
        self._lock()
        if not resumable:
            with naming(self._bin):
                self._file.truncate(0)

    def _lock(self) -> None:
        if lock(self._file) and self._bin.exists() and os.path.samefile(self._bin, self._file.fileno()):
            # Otherwise another process has just finished, and our open file already has its final name.
            if not bin_path(self.prefix).exists():
                return
            with open(bin_path(self.prefix), "rb") as published:
                if lock(published, shared=True):  # otherwise another process has not yet renamed the index
                    return
            if not os.path.getsize(self._bin):  # created when it was opened here: the other has renamed its own
                self._bin.unlink()
        self._file.close()
        raise DataError(f"another process is writing {self.prefix} at this moment; wait for it or choose another name")

    def holds(self, sizes: np.ndarray) -> bool:
        """Whether the file of an interrupted writer is long enough for items of these sizes."""
        return os.fstat(self._file.fileno()).st_size >= int(sizes.sum(dtype=np.int64)) * self.dtype.itemsize

    def take_up(self, sizes: np.ndarray) -> None:
        """Continue after the items of an interrupted writer with these sizes, each of which is a document."""
        self.num_tokens = int(sizes.sum(dtype=np.int64))
        self._file.truncate(self.num_tokens * self.dtype.itemsize)
        self._count(sizes)

    def flush(self) -> None:
        """Bring all that has been added to disk."""
        self._file.flush()
        os.fdatasync(self._file.fileno())

    def add(self, tokens: np.ndarray | Sequence[int], *, end_document: bool = True) -> None:
        """Append one item. `end_document` false leaves its document open for further items."""
        self.add_many(np.asarray(tokens, self.dtype), [len(tokens)], end_document=end_document)

    def add_many(self, tokens: np.ndarray, sizes: Sequence[int] | np.ndarray, *, end_document: bool = True) -> None:
        """Append items of these sizes, which lie back to back in `tokens`. Each is a document of its own, unless
        `end_document` is false."""
        self._file.write(np.ascontiguousarray(tokens, self.dtype).data)
        self.num_tokens += len(tokens)
        self._count(np.asarray(sizes), end_document)

    def _count(self, sizes: np.ndarray, end_document: bool = True) -> None:
        first = len(self.sizes) + 1
        self.sizes.frombytes(sizes.astype("i4").tobytes())
        if end_document:
            self.documents.frombytes(np.arange(first, first + len(sizes), dtype="i8").tobytes())

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        with naming(self._bin):
            try:
                if isinstance(error, OSError):  # of a write: raised again, so that it names the file
                    raise error
                if kind is None:
                    self._publish()
            finally:
                if not (self.published or (interrupted and self.resumable)):
                    self._bin.unlink(missing_ok=True)  # once published, the name may belong to another process
                self._file.close()  # last, because it releases the lock

    def _publish(self) -> None:
        """Give both files their names, once both are on disk.

        The old index is removed before the tokens are replaced, so that no index ever describes other tokens.
        """
        with appearing(idx_path(self.prefix)) as file:
            self._file.flush()
            os.fsync(self._file.fileno())
            sizes = np.frombuffer(self.sizes, "i4") if self.sizes else np.empty(0, "i4")
            write_index(file, self.dtype, sizes, np.frombuffer(self.documents, "i8"))
            file.flush()
            os.fsync(file.fileno())
            behind_links(idx_path(self.prefix)).unlink(missing_ok=True)
            os.replace(self._bin, behind_links(bin_path(self.prefix)))
            self.published = True


def write_index(file: IO[bytes], dtype: np.dtype, sizes: np.ndarray, documents: np.ndarray) -> None:
    """Write the index of items of these sizes, in tokens, which lie back to back; see `castalia.data.indexed`.

    `documents`: the first item of each, and the number of items at the end.
    """
    starts = np.zeros(len(sizes), "<i8")
    np.cumsum(sizes[:-1], out=starts[1:])
    starts *= dtype.itemsize
    file.write(MAGIC + (1).to_bytes(8, "little") + bytes([CODES[dtype]]))
    file.write(len(sizes).to_bytes(8, "little") + len(documents).to_bytes(8, "little"))
    for part in (sizes.astype("<i4"), starts, documents.astype("<i8")):
        file.write(part.data)
