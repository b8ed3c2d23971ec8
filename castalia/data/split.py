"""Which documents of a corpus are for training, validation and testing, and which files they come from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from castalia.config.schema import DataConfig, split_shares
from castalia.data.index_cache import cached, digest_of
from castalia.data.indexed import IndexedDataset, bin_path, dataset_fingerprint, idx_path, open_dataset
from castalia.data.sample_index import split_bounds
from castalia.errors import DataError
from castalia.files import write_text
from castalia.reading import keys, read_json

log = logging.getLogger(__name__)
PARTS = ("train", "valid", "test")
EDGE_TOKENS = 32  # tokens at each end of a document that go into its hash
FILED_FROM = 1 << 20  # documents; which of fewer are held out is found faster than it is read from a file
LONG_SPLIT = 10_000_000  # documents; the hashes of so many take a while
BLOCK_DOCUMENTS = 1 << 15  # documents that are hashed at a time
FACTOR, MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)  # odd constants of SplitMix64
FILES = {"sizes": str, "files": list[str], "documents": list[int]}
SOURCES = keys(FILES, required=FILES)


def split_documents(data: DataConfig, text: IndexedDataset) -> dict[str, np.ndarray]:
    """The documents of `data.path` by part, i32 in ascending order. Raises DataError for shares that are none."""
    if data.holdout == "contiguous":
        bounds = split_bounds(data.split, len(text))
        return {part: np.arange(*bounds[n : n + 2], dtype=np.int32) for n, part in enumerate(PARTS)}
    files = (bin_path(text.prefix), idx_path(text.prefix), sources_path(text.prefix))
    stamp = tuple((found.st_mtime_ns, found.st_size) for found in (file.stat() for file in files if file.is_file()))
    assigned = _assigned(os.path.abspath(text.prefix), stamp, held_out_shares(data.split), data.cache_dir)
    return {part: np.flatnonzero(assigned == n).astype(np.int32) for n, part in enumerate(PARTS)}


def held_out_digest(data: DataConfig) -> str | None:
    """A digest of `data.path` and of which of its documents are for validation. None without `data.path`."""
    if data.path is None:
        return None
    text = open_dataset(data.path)
    return digest_of(dataset_fingerprint(text), split_documents(data, text)["valid"])


def other_held_out(known: str | None, data: DataConfig) -> str | None:
    """A warning if the documents for validation are not those of which a run noted the digest `known`, else None."""
    if known is None or data.path is None or known == held_out_digest(data):
        return None
    return (
        f"the documents of {data.path} that are held out are not those that the run held out, so it may have been "
        f"trained on what it is judged by: the corpus or {sources_path(data.path)} is missing or has changed, or "
        "data.path, data.split or data.holdout is another one here"
    )


@lru_cache(maxsize=4)
def _assigned(
    prefix: str, stamp: tuple[tuple[int, int], ...], shares: tuple[float, float], cache_dir: str | None
) -> np.ndarray:
    """The part of each document, 0 to 2: i8 [documents]. That of many is kept in a file beside the index files.

    `stamp`: of the corpus' files, so that a changed corpus is looked at again.
    """
    text = open_dataset(prefix)

    def find() -> tuple[np.ndarray]:
        if len(text) >= LONG_SPLIT:  # so that nobody waits without knowing for what
            log.warning(
                "%s: finding out which of its %s documents are held out, by the beginning and the end of each",
                text.prefix,
                f"{len(text):,}",
            )
        return (by_hash(document_hashes(text), sources_of(text), shares),)

    if len(text) < FILED_FROM:
        return find()[0]
    known = sources_of(text)
    fingerprint = digest_of(dataset_fingerprint(text), *shares, *(known or ()))
    name = f"{Path(prefix).name}_holdout_{fingerprint}"
    return cached(prefix, cache_dir, [name], ("parts",), fingerprint, find)[0]


def held_out_shares(split: str) -> tuple[float, float]:
    """The shares of validation and test among all documents. Raises DataError for text that is no list of shares."""
    try:
        shares = split_shares(split)
    except ValueError as error:
        raise DataError(f"data.split={split!r}: {error}") from None
    return shares[1] / sum(shares), shares[2] / sum(shares)


def by_hash(
    hashes: np.ndarray, sources: tuple[list[str], np.ndarray] | None, shares: tuple[float, float]
) -> np.ndarray:
    """The part of each document, 0 to 2, by its hash [documents]. `shares` are those of validation and test.

    Documents of equal hash are in the same part, so that no text is both trained on and used for validation. Distinct
    documents are ordered by file and, within a file, by hash. Validation takes documents at equal distances in this
    order, and so its share of each file; small files that follow each other count as one.
    """
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    files = np.zeros(len(first), np.int64) if sources is None else sources[1][first]
    order = np.argsort(files, kind="stable")  # np.unique has sorted the hashes already
    part = np.zeros(len(first), np.int8)
    valid, test = shares
    chosen = _spaced(len(order), valid)
    part[order[chosen]] = 1
    rest = order[~chosen]
    part[rest[_spaced(len(rest), test / (1 - valid) if valid < 1 else 0.0)]] = 2
    return part[inverse.reshape(-1)]


def _spaced(count: int, share: float) -> np.ndarray:
    """A mask [count] that is true for a `share` of the places, at equal distances."""
    edges = np.floor(np.arange(count + 1) * share + 0.5)
    return np.diff(edges) > 0


def document_hashes(text: IndexedDataset) -> np.ndarray:
    """A hash of each document, u64 [documents], from its length and its first and last tokens.

    It does not depend on the dtype of the corpus, and reads little of long documents. Documents that agree in all of
    these count as equal.
    """
    hashes = np.empty(len(text), np.uint64)
    starts = text.starts // text.dtype.itemsize
    places = np.arange(EDGE_TOKENS)
    for first in range(0, len(text), BLOCK_DOCUMENTS):
        sizes = text.sizes[first : first + BLOCK_DOCUMENTS].astype(np.int64)
        begin = starts[first : first + BLOCK_DOCUMENTS]
        state = sizes.astype(np.uint64)
        for ahead in (places, -1 - places):
            # [documents, EDGE_TOKENS]: offsets within the document, whether it has such a token, and its value
            inside = np.where(ahead >= 0, ahead, sizes[:, None] + ahead)
            is_there = (inside >= 0) & (inside < sizes[:, None])
            at = begin[:, None] + np.where(is_there, inside, 0)
            tokens = text.tokens[np.minimum(at, len(text.tokens) - 1)] if len(text.tokens) else np.zeros_like(at)
            values = np.where(is_there, tokens.astype(np.int64) + 1, 0).astype(np.uint64)
            for column in range(EDGE_TOKENS):
                state = (state ^ values[:, column]) * FACTOR
                state ^= state >> np.uint64(29)
        state *= MIX
        hashes[first : first + BLOCK_DOCUMENTS] = state ^ (state >> np.uint64(32))
    return hashes


def sources_of(text: IndexedDataset) -> tuple[list[str], np.ndarray] | None:
    """Names of the files that a corpus was made from, and the number of the file of each document: [documents].

    None if the corpus has no such record, or if the record is of other documents.
    """
    path = sources_path(text.prefix)
    if not path.is_file():
        return None
    try:
        known = read_json(path, DataError, SOURCES)
    except DataError:
        return None
    names, counts = known["files"], known["documents"]
    fits = len(names) == len(counts) and sum(counts) == len(text) and min(counts, default=0) >= 0
    if not fits or known["sizes"] != digest_of_sizes(text.sizes):
        return None
    distinct = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return list(distinct), np.repeat([distinct[name] for name in names], counts)


def file_of_each(text: IndexedDataset) -> list[str]:
    """The name of the file of each document, or the name of the corpus if it has no record of its files."""
    known = sources_of(text)
    return [known[0][file] for file in known[1]] if known else [Path(text.prefix).name] * len(text)


def sources_path(prefix: str | os.PathLike[str]) -> Path:
    """The file that records the sources of a corpus."""
    return Path(f"{os.fspath(prefix)}.sources.json")


def digest_of_sizes(sizes: np.ndarray | Sequence[int]) -> str:
    """A digest of the sizes of all documents, by which a record of sources is known to belong to a corpus."""
    return hashlib.blake2b(np.ascontiguousarray(sizes, "<i4").data, digest_size=16).hexdigest()


def write_sources(
    prefix: str | os.PathLike[str], sizes: np.ndarray | Sequence[int], files: Sequence[tuple[str, int]]
) -> None:
    """Record beside a corpus with these `sizes` [documents] the files of its documents in order: (name, documents)."""
    names, documents = [name for name, _ in files], [count for _, count in files]
    record = {"sizes": digest_of_sizes(sizes), "files": names, "documents": documents}
    write_text(sources_path(prefix), json.dumps(record))


def without_common_folder(paths: Sequence[str]) -> list[str]:
    """The paths relative to the deepest folder that contains all of them."""
    if not paths:
        return []
    common = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return [os.path.relpath(os.path.abspath(path), common) for path in paths]


def describe_held_out(data: DataConfig, text: IndexedDataset) -> str | None:
    """One line about the documents of `data.path` that validation takes, or None if it takes none."""
    valid = split_documents(data, text)["valid"]
    if not len(valid):
        return None
    how = "chosen by a hash of each" if data.holdout == "hash" else f"the ones from {int(valid[0]):,} on"
    summary = f"{len(valid):,} of {len(text):,} documents, {how}"
    known = sources_of(text)
    if known is None:
        return summary
    of_files = len(set(known[1].tolist()))
    return f"{summary}, from {len(set(known[1][valid].tolist())):,} of {of_files:,} files"


def one_sided(data: DataConfig, text: IndexedDataset) -> str | None:
    """A warning if the documents that validation takes come from few files of the corpus, else None.

    Few are files that hold less than half of the documents that training takes.
    """
    known, parts = sources_of(text), split_documents(data, text)
    if known is None or data.holdout == "hash" or not len(parts["valid"]):
        return None
    names, numbers = known
    seen = set(numbers[parts["valid"]].tolist())
    trained = Counter(numbers[parts["train"]].tolist())
    covered = sum(count for file, count in trained.items() if file in seen)
    if len(names) < 2 or 2 * covered >= sum(trained.values()):
        return None
    shown = ", ".join(names[file] for file in sorted(seen)[:3]) + (", ..." if len(seen) > 3 else "")
    return (
        f"validation says little about most of this corpus: its {len(parts['valid']):,} documents are the last ones, "
        f"all from {shown} ({len(seen):,} of {len(set(numbers.tolist())):,} files). data.holdout=hash takes some of "
        "each file"
    )
