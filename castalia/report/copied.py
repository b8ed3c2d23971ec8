"""The training text that is nearest to a sample: the longest run of tokens that the two have in common.

Exact for runs of at least `shortest` tokens: every stretch of so many tokens in the corpus is hashed and looked up
among those of the samples, and what is found is compared token by token. Memory is one block's, whatever the corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from castalia.data.indexed import IndexedDataset

BLOCK_TOKENS = 1 << 20
FACTOR = 0x9E3779B97F4A7C15  # odd, so that powers of it never become 0 modulo 2^64


@dataclass(frozen=True)
class CommonRun:
    """Tokens `start` to `stop` of a sample, which stand at `at` in a document of a corpus as well."""

    start: int
    stop: int
    corpus: int
    document: int
    at: int

    @property
    def length(self) -> int:
        """In tokens."""
        return self.stop - self.start


@dataclass(frozen=True)
class Searched:
    """What of a corpus was looked at: all of it, or stretches that are spread over it."""

    tokens: int
    of_tokens: int


def longest_runs(
    samples: Sequence[np.ndarray],
    corpora: Sequence[IndexedDataset],
    shortest: int,
    most_tokens: int,
    excluded: Callable[[int], np.ndarray | None] = lambda corpus: None,
) -> tuple[list[CommonRun | None], Searched]:
    """For each of the samples [tokens] its longest run, None where none has `shortest` tokens.

    At most `most_tokens` of the corpora are looked at. `excluded` gives a corpus' documents that are not training text,
    a mask [documents]. A run ends with its document.
    """
    found: list[CommonRun | None] = [None] * len(samples)
    index = _Index.of(samples, shortest)
    total = sum(len(corpus.tokens) for corpus in corpora)
    looked_at = 0
    for number, corpus in enumerate(corpora):
        mask = excluded(number)
        for first, stop in _stretches(len(corpus.tokens), min(1.0, most_tokens / max(total, 1))):
            looked_at += stop - first
            _search(index, corpus, number, first, stop, mask, found)
    return found, Searched(looked_at, total)


def _stretches(length: int, share: float) -> list[tuple[int, int]]:
    """Blocks of a corpus; where only a share of its tokens is looked at, they are spread evenly."""
    count = -(-length // BLOCK_TOKENS)
    wanted = count if share == 1.0 else min(count, max(1, int(share * count)))
    chosen: list[int] = np.unique(np.linspace(0, count - 1, wanted).round().astype(int)).tolist()
    return [(block * BLOCK_TOKENS, min(length, (block + 1) * BLOCK_TOKENS)) for block in chosen]


@dataclass(frozen=True)
class _Index:
    """Every stretch of `shortest` tokens of the samples, in order of their hashes."""

    tokens: np.ndarray  # of all samples back to back, each followed by -1
    shortest: int
    hashes: np.ndarray  # u64, sorted
    places: np.ndarray  # in `tokens`
    sample: np.ndarray  # number of the sample, for each of `tokens`
    starts: np.ndarray  # of the samples in `tokens`

    @classmethod
    def of(cls, samples: Sequence[np.ndarray], shortest: int) -> _Index:
        """The index of all stretches of `shortest` tokens in the samples."""
        parts = [np.append(sample, -1).astype(np.int64) for sample in samples]
        sizes = np.array([len(part) for part in parts], np.int64)
        tokens = np.concatenate(parts) if parts else np.empty(0, np.int64)
        hashes = hashes_of(tokens, shortest)
        places = np.arange(len(hashes))
        # No stretch goes over the -1 between two samples.
        whole = np.array([(tokens[place : place + shortest] >= 0).all() for place in places], bool)
        places, hashes = places[whole], hashes[whole]
        order = np.argsort(hashes, kind="stable")
        sample = np.repeat(np.arange(len(parts)), sizes)
        return cls(tokens, shortest, hashes[order], places[order], sample, np.cumsum(sizes) - sizes)


def hashes_of(tokens: np.ndarray, length: int) -> np.ndarray:
    """A hash, u64, of every stretch of `length` tokens, by its first one."""
    count = max(0, len(tokens) - length + 1)
    hashes = np.zeros(count, np.uint64)
    for place in range(length):
        hashes *= np.uint64(FACTOR)
        hashes += tokens[place : place + count].astype(np.uint64) + np.uint64(1)
    return hashes ^ (hashes >> np.uint64(29))


def _search(
    index: _Index,
    corpus: IndexedDataset,
    number: int,
    first: int,
    stop: int,
    excluded: np.ndarray | None,
    found: list[CommonRun | None],
) -> None:
    """Runs that begin with the tokens `first` to `stop` of a corpus."""
    if not len(index.hashes):
        return
    block = corpus.tokens[first : stop + index.shortest - 1]  # a stretch may end in the next block
    hashes = hashes_of(block, index.shortest)
    low = np.searchsorted(index.hashes, hashes, "left")
    # Hashes above the largest have their place behind the last one: the minimum keeps them inside, as no hit.
    hits = np.flatnonzero(index.hashes[np.minimum(low, len(index.hashes) - 1)] == hashes)
    if not len(hits):
        return
    many = np.searchsorted(index.hashes, hashes[hits], "right") - low[hits]  # the same stretch stands in several places
    at = np.repeat(hits, many) + first
    # For each hit low, low + 1, ..., one for each place of its stretch, in one array: [pairs].
    place = index.places[np.repeat(low[hits] - np.cumsum(many) + many, many) + np.arange(many.sum())]
    starts = corpus.starts // corpus.dtype.itemsize  # the index counts bytes
    document = np.searchsorted(starts, at, "right") - 1
    ends = starts[document] + corpus.sizes[document]
    keep = np.ones(len(at), bool) if excluded is None else ~excluded[document]
    at, place, document, ends = at[keep], place[keep], document[keep], ends[keep]
    lengths = _common(corpus.tokens, at, ends, index.tokens, place)
    for sample in np.unique(index.sample[place]):
        mine = np.flatnonzero(index.sample[place] == sample)
        best = mine[np.argmax(lengths[mine])]
        length, before = int(lengths[best]), found[sample]
        if length >= index.shortest and (before is None or length > before.length):
            start = int(place[best] - index.starts[sample])
            inside = int(at[best] - starts[document[best]])
            found[sample] = CommonRun(start, start + length, number, int(document[best]), inside)


def _common(corpus: np.ndarray, at: np.ndarray, ends: np.ndarray, tokens: np.ndarray, place: np.ndarray) -> np.ndarray:
    """How many tokens from `at` [hits] on, before `ends`, are those from `place` on. Samples end with -1."""
    lengths = np.zeros(len(at), np.int64)
    alive = np.flatnonzero(at < ends)
    while len(alive):
        same = corpus[at[alive] + lengths[alive]] == tokens[place[alive] + lengths[alive]]
        alive = alive[same]
        lengths[alive] += 1
        alive = alive[at[alive] + lengths[alive] < ends[alive]]
    return lengths
