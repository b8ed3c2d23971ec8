"""Which corpus each sample comes from: exactly the original's order, for any number of corpora below 255."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import numpy as np

from castalia.errors import DataError


def normalized(weights: Sequence[float]) -> np.ndarray:
    """Weights that sum to one, summed one after the other as the original does."""
    array = np.array(weights, np.float64)
    return array / sum(weights)


def weights_by_documents(counts: Sequence[int], alpha: float) -> np.ndarray:
    """Weights from document counts: shares to the power `alpha`, then scaled by one minus the share."""
    if len(counts) == 1:
        return np.ones(1)
    shares = np.array(counts, np.float64) / sum(counts)
    powered = shares**alpha
    weights = powered / powered.sum() * (1 - shares)
    return weights / weights.sum()


def blend(weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Corpus (u8) and sample within it (i64) of each of `size` positions.

    Position s takes the first corpus i that maximises `weights[i] * max(s, 1) - taken[i]`. The chain is cut into about
    sqrt(size) segments that advance side by side. Each starts from guessed counts; a segment whose start is not the end
    of the one before it runs again from there, until all agree: then every position follows from the first. Two chains
    at the same position with different counts draw together, which is why the second round is nearly always the last.
    """
    if len(weights) >= 255:
        raise DataError(f"{len(weights)} corpora cannot be blended: the most is 254; merge some of them")
    length = isqrt(size) + 1
    firsts = np.arange(0, size, length)
    starts = _guess(weights, firsts)
    ends = np.empty_like(starts)
    choice = np.empty((len(firsts), length), np.uint8)
    sample = np.empty((len(firsts), length), np.int64)
    stale = np.arange(len(firsts))
    while len(stale):
        choice[stale], sample[stale], ends[:, stale] = _advance(weights, firsts[stale], starts[:, stale], length)
        stale = 1 + np.flatnonzero((starts[:, 1:] != ends[:, :-1]).any(axis=0))
        starts[:, stale] = ends[:, stale - 1]
    return choice.reshape(-1)[:size], sample.reshape(-1)[:size]


def _guess(weights: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Whole numbers [corpora, positions] near weight * position that sum to the position; exact at position 0."""
    shares = weights[:, None] * positions
    counts = np.floor(shares)
    missing = positions - counts.sum(axis=0)
    rank = np.argsort(np.argsort(counts - shares, axis=0, kind="stable"), axis=0)
    return counts + (rank < missing)


def _advance(
    weights: np.ndarray, firsts: np.ndarray, starts: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run the chains from `firsts` with counts `starts` [corpora, chains] for `length` steps: choices, samples
    [chains, length] and the counts at the end."""
    taken = starts.copy()
    chains = np.arange(len(firsts))
    choice = np.empty((length, len(firsts)), np.uint8)
    sample = np.empty((length, len(firsts)), np.int64)
    for step in range(length):
        position = np.maximum(firsts + step, 1).astype(np.float64)
        best = weights[0] * position - taken[0]
        chosen = choice[step]
        chosen[:] = 0
        for i in range(1, len(weights)):
            score = weights[i] * position - taken[i]
            better = score > best
            np.copyto(best, score, where=better)
            chosen[better] = i
        sample[step] = taken[chosen, chains]
        taken[chosen, chains] += 1
    return choice.T, sample.T, taken
