"""A tokenizer and a corpus out of a folder, and the part of it that is kept for judging the model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

import numpy as np

from castalia.data.indexed import DatasetWriter, open_dataset

STRETCH_TOKENS = 1024  # of a long document: what is held out or trained on as one
LEAST_HELD_OUT = 2  # stretches


def hold_out(prefix: str | os.PathLike[str], train: str, valid: str, share: float) -> tuple[int, int]:
    """Write two corpora out of one, and return their tokens: about `share` of the text goes to the second.

    A hash of its tokens says where a document belongs, so that the same text is never on both sides and every file has
    its part in what is held out. A document that is longer than a stretch is divided into stretches, whose
    neighbours stay together: a folder with one long book has something to hold out, too.
    """
    data = open_dataset(prefix)
    stretches = [(item, *bounds) for item in range(len(data)) for bounds in _stretches(int(data.sizes[item]))]
    ranks = [_rank(data[item][first:end]) for item, first, end in stretches]
    limit = max(share, sorted(ranks)[min(LEAST_HELD_OUT, len(ranks) - 1)])
    with DatasetWriter(train, data.dtype) as kept, DatasetWriter(valid, data.dtype) as held:
        for item, first, end, is_held in _joined(stretches, [rank < limit for rank in ranks]):
            (held if is_held else kept).add(data[item][first:end])
    return kept.num_tokens, held.num_tokens


def _stretches(size: int) -> list[tuple[int, int]]:
    """Of a document: the last one may be up to twice as long."""
    count = max(1, size // STRETCH_TOKENS)
    firsts = [number * STRETCH_TOKENS for number in range(count)]
    return list(zip(firsts, [*firsts[1:], size], strict=True))


def _rank(tokens: np.ndarray) -> float:
    """From 0 to 1, by content."""
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "little") / 2**64


def _joined(stretches: list[tuple[int, int, int]], held: list[bool]) -> Iterator[tuple[int, int, int, bool]]:
    """Neighbouring stretches of a document with the same fate as one."""
    begun: tuple[int, int, int, bool] | None = None
    for (item, first, end), is_held in zip(stretches, held, strict=True):
        if begun and (begun[0], begun[3]) == (item, is_held):
            begun = (item, begun[1], end, is_held)
            continue
        if begun:
            yield begun
        begun = (item, first, end, is_held)
    if begun:
        yield begun
