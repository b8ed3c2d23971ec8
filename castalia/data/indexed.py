"""Indexed corpora: `PREFIX.bin` holds the token ids of all items back to back, `PREFIX.idx` where each item lies.

The format is that of GPT-NeoX and Megatron-LM (MMapIndexedDataset). An item is a run of tokens; a document is one item
or several. All integers are little-endian.

    .idx   offset     type     content
           0          9 bytes  magic "MMIDIDX\\0\\0"
           9          u64      version, 1
           17         u8       code of the dtype of the tokens, see `DTYPES`
           18         u64      number of items N
           26         u64      length D of the document table
           34         i32[N]   size of each item in tokens
           34 + 4 N   i64[N]   start of each item in bytes
           34 + 12 N  i64[D]   first item of each document, and N at the end

The older layout with the magic "TNTIDX" can be read, but not written.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, overload

import numpy as np

from castalia.errors import DataError, refuse_pointer
from castalia.files import appearing, behind_links, beside, lock, naming

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
HEADER_BYTES = 34
LEGACY_HEADER_BYTES = 56
DTYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "f4", 7: "f8", 8: "u2"}
CODES = {np.dtype(f"<{name}"): code for code, name in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class IndexedDataset(Sequence[np.ndarray]):
    """A sequence of read-only 1-D arrays of token ids, one for each item. They are views of the mapped file."""

    prefix: str
    tokens: np.ndarray  # all items back to back
    sizes: np.ndarray  # i32 [items], in tokens
    starts: np.ndarray  # i64 [items], in bytes
    doc_index: np.ndarray  # i64, first item of each document and N at the end; GPT-NeoX's merge leaves it as [0]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the token ids."""
        return self.tokens.dtype

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = int(self.starts[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sizes[index])]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))


def dataset_fingerprint(data: IndexedDataset) -> str:
    """A digest of the whole index (every size, the dtype, the documents), of the length of the `.bin`, and of 64 blocks
    of 4 KiB spread over it. It is cheap for any length, but an edit of tokens that keeps all lengths can escape it."""
    raw = data.tokens.view(np.uint8)
    digest = hashlib.blake2b(f"{data.dtype.str} {len(raw)}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(data.sizes).data)
    digest.update(np.ascontiguousarray(data.doc_index).data)
    for start in np.linspace(0, max(0, len(raw) - 4096), 64).astype(np.int64):
        digest.update(raw[start : start + 4096].data)
    return digest.hexdigest()


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    """The file with the tokens of a corpus."""
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    """The index file of a corpus."""
    return Path(f"{os.fspath(prefix)}.idx")


def open_dataset(prefix: str | os.PathLike[str]) -> IndexedDataset:
    """Map `PREFIX.bin` and `PREFIX.idx` into memory. `prefix` may also be the path of one of the two.

    Raises DataError if one is missing or damaged, or if they are not of one corpus.
    """
    name = os.fspath(prefix)
    if name.endswith((".bin", ".idx")) and not idx_path(name).exists():
        name = name[:-4]
    for path in (idx_path(name), bin_path(name)):
        if not path.is_file():
            raise DataError(
                f"{path} does not exist; a corpus is a pair PREFIX.bin, PREFIX.idx: give the prefix of both"
            )
    index = _map(idx_path(name))
    dtype, sizes, starts, documents = _parse_any(name, index)
    tokens = _map(bin_path(name))
    _check(name, dtype, sizes, starts)
    return IndexedDataset(name, np.frombuffer(tokens, dtype), sizes, starts, documents)


def read_row_form(prefix: str | os.PathLike[str]) -> tuple[int, np.dtype]:
    """Tokens of an item and their dtype, of a corpus whose items are equally long; `PREFIX.bin` need not be there.

    Raises DataError if the lengths differ.
    """
    name = os.fspath(prefix)
    dtype, sizes, _, _ = _parse_any(name, _map(idx_path(name)))
    if not len(sizes) or int(sizes.min()) != int(sizes.max()) or not sizes[0]:
        raise DataError(f"{idx_path(name)}: its items are not rows of one length")
    return int(sizes[0]), dtype


def _map(path: Path) -> mmap.mmap | bytes:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        refuse_pointer(path, os.pread(file.fileno(), 64, 0), DataError)
        # An empty file cannot be mapped.
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""


def _integer(index: mmap.mmap | bytes, offset: int, size: int = 8) -> int:
    return int.from_bytes(index[offset : offset + size], "little")


def _dtype(name: str, code: int) -> np.dtype:
    if code not in DTYPES:
        raise DataError(
            f"{idx_path(name)}: dtype code {code} is unknown; the codes are {_codes()}: the file is damaged"
        )
    return np.dtype(f"<{DTYPES[code]}")


def _codes() -> str:
    return ", ".join(f"{code} {name}" for code, name in DTYPES.items())


def _check_header(name: str, length: int, header: int, version: int) -> None:
    if length < header:
        raise DataError(f"{idx_path(name)} is truncated: {length} bytes, the header alone has {header}")
    if version != 1:
        raise DataError(f"{idx_path(name)} has version {version}; only version 1 is known")


def _check_length(name: str, length: int, expected: int, items: int) -> None:
    if length != expected:
        state = "truncated" if length < expected else "too long"
        raise DataError(f"{idx_path(name)} is {state}: {length} bytes, but {items} items need {expected}")


def _parse_any(name: str, index: mmap.mmap | bytes) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """The dtype of the tokens, sizes, starts and documents of an index of either kind."""
    if index[: len(MAGIC)] == MAGIC:
        return _parse(name, index)
    if index[: len(LEGACY_MAGIC)] == LEGACY_MAGIC:
        return _parse_legacy(name, index)
    raise DataError(
        f"{idx_path(name)} is not the index of a corpus: it begins with {bytes(index[:9])!r}, "
        f"not {MAGIC!r} or {LEGACY_MAGIC!r}"
    )


def _parse(name: str, index: mmap.mmap | bytes) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    _check_header(name, len(index), HEADER_BYTES, _integer(index, 9))
    dtype = _dtype(name, _integer(index, 17, 1))
    items, documents = _integer(index, 18), _integer(index, 26)
    if items and len(index) == HEADER_BYTES + 13 * items + 8 * documents:
        raise DataError(
            f"{idx_path(name)} is a multimodal index of Megatron: behind its tables each of its {items} items has a "
            "byte that tells whether it is text or something else; only corpora of text can be read"
        )
    _check_length(name, len(index), HEADER_BYTES + 12 * items + 8 * documents, items)
    sizes = np.frombuffer(index, "<i4", items, HEADER_BYTES)
    starts = np.frombuffer(index, "<i8", items, HEADER_BYTES + 4 * items)
    return dtype, sizes, starts, np.frombuffer(index, "<i8", documents, HEADER_BYTES + 12 * items)


def _parse_legacy(name: str, index: mmap.mmap | bytes) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    _check_header(name, len(index), LEGACY_HEADER_BYTES, _integer(index, 8))
    dtype = _dtype(name, _integer(index, 16))
    items, dims, documents = (_integer(index, offset) for offset in (32, 40, 48))
    if dims != items:
        raise DataError(
            f"{idx_path(name)}: {items} items with {dims} dimensions; only one-dimensional items are corpora"
        )
    _check_length(name, len(index), LEGACY_HEADER_BYTES + 8 * (2 * (items + 1) + items + documents), items)
    starts = np.frombuffer(index, "<i8", items, LEGACY_HEADER_BYTES + 8 * (items + 1)) * dtype.itemsize
    sizes = np.frombuffer(index, "<i8", items, LEGACY_HEADER_BYTES + 16 * (items + 1)).astype("<i4")
    table = np.frombuffer(index, "<i8", documents, LEGACY_HEADER_BYTES + 8 * (2 * (items + 1) + items))
    return dtype, sizes, starts, table


def _check(name: str, dtype: np.dtype, sizes: np.ndarray, starts: np.ndarray) -> None:
    """Raises DataError unless the items lie back to back and fill the `.bin` exactly."""
    length = bin_path(name).stat().st_size
    ends = np.cumsum(sizes, dtype=np.int64)
    expected = int(ends[-1]) * dtype.itemsize if len(ends) else 0
    if length < expected:
        raise DataError(
            f"{bin_path(name)} is truncated: {length} bytes, its index describes {expected}; prepare it again"
        )
    ends *= dtype.itemsize
    in_order = not len(sizes) or (starts[0] == 0 and np.array_equal(starts[1:], ends[:-1]) and int(sizes.min()) >= 0)
    if length > expected or not in_order:
        raise DataError(
            f"{idx_path(name)} disagrees with {bin_path(name)}: its items end at byte {expected} of {length}"
            f"{'' if in_order else ' and do not lie back to back'}; the two are not of one corpus"
        )


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
            self._write_index(file)
            file.flush()
            os.fsync(file.fileno())
            behind_links(idx_path(self.prefix)).unlink(missing_ok=True)
            os.replace(self._bin, behind_links(bin_path(self.prefix)))
            self.published = True

    def _write_index(self, file: IO[bytes]) -> None:
        sizes = np.frombuffer(self.sizes, "i4").astype("<i4") if self.sizes else np.empty(0, "<i4")
        starts = np.zeros(len(sizes), "<i8")
        np.cumsum(sizes[:-1], out=starts[1:])
        starts *= self.dtype.itemsize
        file.write(MAGIC + (1).to_bytes(8, "little") + bytes([CODES[self.dtype]]))
        file.write(len(sizes).to_bytes(8, "little") + len(self.documents).to_bytes(8, "little"))
        for part in (sizes, starts, np.frombuffer(self.documents, "i8").astype("<i8")):
            file.write(part.data)
