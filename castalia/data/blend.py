"""Which corpus each sample comes from, in exactly the order of GPT-NeoX (helpers.cpp), for up to 254 corpora."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import numpy as np

from castalia.errors import DataError


def normalized(weights: Sequence[float]) -> np.ndarray:
    """Weights that sum to one. They are added in order, as in GPT-NeoX, which decides the last bit."""
    array = np.array(weights, np.float64)
    return array / sum(weights)


def weights_by_documents(counts: Sequence[int], alpha: float) -> np.ndarray:
    """Weights from the number of documents of each corpus: shares to the power `alpha`, times one minus the share.

    This is `weight_by_num_documents` of GPT-NeoX.
    """
    if len(counts) == 1:
        return np.ones(1)
    shares = np.array(counts, np.float64) / sum(counts)
    powered = shares**alpha
    weights = powered / powered.sum() * (1 - shares)
    return weights / weights.sum()


def blend(weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The corpus (u8) and the sample within it (i64) of each of `size` positions.

    Position s takes the first corpus i that maximises `weights[i] * max(s, 1) - taken[i]`, where `taken` counts the
    samples of each corpus so far. This chain has one step per position, so NumPy could not help; therefore it is cut
    into about sqrt(size) segments that advance together, one step of all segments at a time.

    Each segment starts from guessed counts. Afterwards, a segment that did not start with the counts at the end of its
    predecessor runs again from those, until all agree, and the result is that of the single chain. Chains at the same
    position converge even from different counts, so the second round is nearly always the last.

    Raises DataError for more than 254 corpora.
    """
    if len(weights) >= 255:
        raise DataError(f"{len(weights)} corpora cannot be blended: the most is 254; merge some of them")
    length = isqrt(size) + 1  # steps of each segment
    firsts = np.arange(0, size, length)
    starts = _guess(weights, firsts)
    ends = np.empty_like(starts)
    choice = np.empty((len(firsts), length), np.uint8)
    sample = np.empty((len(firsts), length), np.int64)
    stale = np.arange(len(firsts))  # segments to run
    while len(stale):
        choice[stale], sample[stale], ends[:, stale] = _advance(weights, firsts[stale], starts[:, stale], length)
        # Segments whose predecessor did not end with the counts that they began with.
        stale = 1 + np.flatnonzero((starts[:, 1:] != ends[:, :-1]).any(axis=0))
        starts[:, stale] = ends[:, stale - 1]
    return choice.reshape(-1)[:size], sample.reshape(-1)[:size]


def _guess(weights: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Likely counts: integers [corpora, positions] near weight * position that sum to the position."""
    shares = weights[:, None] * positions
    counts = np.floor(shares)
    missing = positions - counts.sum(axis=0)
    rank = np.argsort(np.argsort(counts - shares, axis=0, kind="stable"), axis=0)
    return counts + (rank < missing)


def _advance(
    weights: np.ndarray, firsts: np.ndarray, starts: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run chains from the positions `firsts` with counts `starts` [corpora, chains] for `length` steps.

    Returns corpora and samples, both [chains, length], and the counts at the end.
    """
    taken = starts.copy()
    chains = np.arange(len(firsts))
    choice = np.empty((length, len(firsts)), np.uint8)
    sample = np.empty((length, len(firsts)), np.int64)
    for step in range(length):
        position = np.maximum(firsts + step, 1).astype(np.float64)  # [chains]
        best = weights[0] * position - taken[0]
        chosen = choice[step]
        chosen[:] = 0
        for i in range(1, len(weights)):
            score = weights[i] * position - taken[i]
            better = score > best  # strictly, so that the first of equal corpora wins, as in GPT-NeoX
            np.copyto(best, score, where=better)
            chosen[better] = i
        sample[step] = taken[chosen, chains]
        taken[chosen, chains] += 1
    return choice.T, sample.T, taken
