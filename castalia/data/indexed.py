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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from castalia.errors import DataError, refuse_pointer

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
