"""Operations on whole corpora: merge, split, count."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal

import numpy as np

from castalia.data.dataset_writer import DatasetWriter
from castalia.data.indexed import IndexedDataset, bin_path, open_dataset
from castalia.data.sample_index import split_bounds
from castalia.data.split import (
    PARTS,
    by_hash,
    document_hashes,
    file_of_each,
    held_out_shares,
    sources_of,
    without_common_folder,
    write_sources,
)
from castalia.errors import DataError

BLOCK_TOKENS = 1 << 22


def describe(data: IndexedDataset) -> dict[str, Any]:
    """Counts, dtype, largest id and a histogram of lengths whose bins are powers of two."""
    sizes = data.sizes
    counts = np.bincount(np.frexp(sizes)[1])  # bin k: lengths 2^(k-1) to 2^k - 1
    return {
        "prefix": data.prefix,
        "documents": len(_documents(data)) - 1,
        "items": len(data),
        "tokens": int(sizes.sum(dtype=np.int64)),
        "dtype": data.dtype.name,
        "bytes": data.tokens.nbytes,
        "largest_id": largest_id(data),
        "shortest": int(sizes.min()) if len(data) else 0,
        "longest": int(sizes.max()) if len(data) else 0,
        "lengths": [
            {"from": 1 << k >> 1, "to": (1 << k) - 1, "items": int(count)} for k, count in enumerate(counts) if count
        ],
    }


def largest_id(data: IndexedDataset) -> int | float | None:
    """The largest token id, or None for an empty corpus."""
    blocks = range(0, len(data.tokens), BLOCK_TOKENS)
    return max((data.tokens[first : first + BLOCK_TOKENS].max().item() for first in blocks), default=None)


def sampled_largest_id(data: IndexedDataset, tokens: int) -> tuple[int | None, int]:
    """The largest id among up to `tokens` ids in 64 stretches of the corpus, and the number of ids examined."""
    if len(data.tokens) <= tokens:
        stretches = [data.tokens]
    else:
        firsts = np.linspace(0, len(data.tokens) - tokens // 64, 64).astype(np.int64)
        stretches = [data.tokens[first : first + tokens // 64] for first in firsts]
    largest = max((int(stretch.max()) for stretch in stretches if len(stretch)), default=None)
    return largest, sum(map(len, stretches))


def duplicates(data: IndexedDataset) -> int:
    """The number of items that equal an earlier one."""
    return len(data) - len({hashlib.blake2b(item.data, digest_size=16).digest() for item in data})


def merge(prefixes: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> IndexedDataset:
    """Write the corpora one after the other as one corpus, documents included (GPT-NeoX's tool loses those).

    Raises DataError if the output is one of the inputs.
    """
    parts = [open_dataset(prefix) for prefix in prefixes]
    _refuse_input_as_output(parts, [os.fspath(output)])
    with DatasetWriter(output, np.result_type(*(part.dtype for part in parts))) as writer:
        for part in parts:
            _copy(writer, part, np.arange(len(_documents(part)) - 1))
        write_sources(output, writer.sizes, _files_of(parts))
    return open_dataset(output)


def _files_of(parts: Sequence[IndexedDataset]) -> list[tuple[str, int]]:
    """The number of items from each source file, in order. A corpus that does not know its files counts as one."""
    found: list[tuple[str, int]] = []
    for name, part in zip(without_common_folder([part.prefix for part in parts]), parts, strict=True):
        known = sources_of(part) is not None
        each = [f"{name}/{file}" for file in file_of_each(part)] if known else [name] * len(part)
        found += [(file, len(list(same))) for file, same in groupby(each)]
    return found


def split(
    prefix: str | os.PathLike[str],
    weights: str,
    output: str | os.PathLike[str],
    by: Literal["hash", "order"] = "hash",
) -> list[IndexedDataset]:
    """Write `{output}_train`, `{output}_valid` and `{output}_test`, each with its share of the documents, in order.

    `hash`: some of each source file, as with `data.holdout: hash`; `order`: the last documents are the last part's.
    Parts without documents are left out. Raises DataError if an output is the input.
    """
    data = open_dataset(prefix)
    chosen = _by_hash(data, weights) if by == "hash" else _by_order(data, weights)
    names = [f"{os.fspath(output)}_{part}" for part in PARTS]
    written = [part for part in zip(names, chosen, strict=True) if len(part[1])]
    _refuse_input_as_output([data], [name for name, _ in written])
    known, table = sources_of(data), _documents(data)
    for name, documents in written:
        with DatasetWriter(name, data.dtype) as writer:
            _copy(writer, data, documents)
            if known:
                taken = np.zeros(len(table) - 1, bool)
                taken[documents] = True
                files = known[1][np.repeat(taken, np.diff(table))].tolist()  # of each item
                write_sources(name, writer.sizes, [(known[0][file], len(list(same))) for file, same in groupby(files)])
    return [open_dataset(name) for name, _ in written]


def _by_order(data: IndexedDataset, weights: str) -> list[np.ndarray]:
    bounds = split_bounds(weights, len(_documents(data)) - 1)
    return [np.arange(*bounds[n : n + 2]) for n in range(len(PARTS))]


def _by_hash(data: IndexedDataset, weights: str) -> list[np.ndarray]:
    """A document of several items has the sum of their hashes, modulo 2^64, and the file of the first."""
    shares, table, known = held_out_shares(weights), _documents(data), sources_of(data)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(document_hashes(data), dtype=np.uint64)])
    first = np.minimum(table[:-1], len(data) - 1)  # a document without items may stand at the end
    assigned = by_hash(np.diff(sums[table]), (known[0], known[1][first]) if known else None, shares)
    return [np.flatnonzero(assigned == n) for n in range(len(PARTS))]


def _documents(data: IndexedDataset) -> np.ndarray:
    """The first item of each document and N at the end. Where GPT-NeoX's merge lost the table, every item counts."""
    complete = len(data.doc_index) and data.doc_index[-1] == len(data)
    return data.doc_index if complete else np.arange(len(data) + 1)


def _copy(writer: DatasetWriter, data: IndexedDataset, documents: np.ndarray) -> None:
    """Append these documents of `data`, whose numbers ascend."""
    table = _documents(data)
    ends = np.concatenate([[0], np.cumsum(data.sizes, dtype=np.int64)])
    for stretch in np.split(documents, np.flatnonzero(np.diff(documents) != 1) + 1) if len(documents) else ():
        first, stop = int(stretch[0]), int(stretch[-1]) + 1
        low, high = int(table[first]), int(table[stop])
        begin, end = int(ends[low]), int(ends[high])
        before = len(writer.sizes)
        for at in range(begin, end, BLOCK_TOKENS):
            writer.add_many(data.tokens[at : min(at + BLOCK_TOKENS, end)], ())
        writer.sizes.extend(data.sizes[low:high].tolist())
        writer.documents.extend((table[first + 1 : stop + 1] - low + before).tolist())


def _refuse_input_as_output(inputs: Sequence[IndexedDataset], outputs: Sequence[str]) -> None:
    for output in outputs:
        for data in inputs:
            if bin_path(output).exists() and bin_path(output).samefile(bin_path(data.prefix)):
                raise DataError(f"{output} is an input as well; write to another name")
