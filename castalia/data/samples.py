"""Which tokens a sample holds: the document, sample and shuffle index of each way of packing.

Every function is pure and gives the arrays of the original bit for bit. S is the sequence length; a sample has S + 1
tokens, so that inputs and shifted labels both have S. Each item of a corpus counts as a document.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from castalia.data.indexed import IndexedDataset
from castalia.errors import DataError

IGNORE = -100


def split_bounds(split: str, num_documents: int) -> list[int]:
    """Borders [0, b1, b2, n] of train, valid and test documents for weights such as "969, 30, 1" or "8/1/1"."""
    try:
        weights = [float(part) for part in re.split("[,/]", split)]
    except ValueError:
        raise DataError(f"data.split={split!r} is no list of numbers such as '969, 30, 1'") from None
    weights = (weights + [0.0, 0.0])[:3]
    total = sum(weights)
    if not total > 0 or min(weights) < 0:
        raise DataError(f"data.split={split!r} leaves no documents: its parts must not be negative nor all zero")
    bounds = [0]
    for weight in weights:
        bounds.append(bounds[-1] + int(round(weight / total * num_documents)))
    surplus = bounds[-1] - num_documents
    return [0, *(bound - surplus for bound in bounds[1:])]


@dataclass(frozen=True, eq=False)
class Index:
    """`documents` in reading order; sample k runs from `bounds[k]` to `bounds[k + 1]`, pairs (position in `documents`,
    token offset); position q of the data order is sample `order[q]`."""

    documents: np.ndarray
    bounds: np.ndarray  # [n + 1, 2]
    order: np.ndarray

    def __len__(self) -> int:
        return len(self.order) - 1  # the original never uses the last one


def build_packed(
    sizes: np.ndarray, documents: np.ndarray, num_samples: int | None, seq_length: int, seed: int
) -> Index:
    """Documents back to back, cut every S tokens; neighbours share a token. Whole epochs, shuffled as one.

    `sizes` [items] in tokens, `documents` the ids of this split; `num_samples` None means one epoch.
    """
    tokens = int(sizes[documents].sum(dtype=np.int64))
    if tokens < 2:
        raise DataError(f"{len(documents)} documents hold {tokens} tokens: nothing to train on")
    epochs = 1 if num_samples is None else max(1, -(-(num_samples * seq_length + 1) // tokens))
    rng = np.random.RandomState(seed)
    order = np.tile(documents.astype(np.int32), epochs)
    rng.shuffle(order)
    count = (epochs * tokens - 1) // seq_length
    wide = 2 * ((epochs * tokens - 1) / seq_length + 1) >= np.iinfo(np.int32).max - 1
    bounds = np.empty((count + 1, 2), np.int64 if wide else np.int32)
    ends = np.cumsum(sizes[order], dtype=np.int64)
    for first in range(0, count + 1, 1 << 20):  # in blocks: the temporaries stay small beside the index
        cuts = np.arange(first, min(first + (1 << 20), count + 1), dtype=np.int64) * seq_length
        at = np.searchsorted(ends, cuts, side="right")
        bounds[first : first + len(cuts), 0] = at
        bounds[first : first + len(cuts), 1] = cuts - np.where(at > 0, ends[at - 1], 0)
    shuffle = np.arange(count, dtype=np.uint32 if count < np.iinfo(np.uint32).max - 1 else np.int64)
    rng.shuffle(shuffle)
    return Index(order, bounds, shuffle)


def locate(index: Index, position: int) -> int:
    """Sample at a position of the data order. A position or sample that runs off the end is taken modulo the length,
    as often as needed: the original's retry rule, which decides what late positions of a blend hold."""
    for _ in range(len(index.order) + 1):
        if position < len(index.order):
            position = int(index.order[position])
            if index.bounds[position + 1, 0] < len(index.documents):
                return position
        if len(index) < 1:
            break
        position %= len(index)
    raise DataError(
        f"{len(index.documents)} documents do not give one whole sample: use more data or a smaller data.seq_length"
    )


def pieces(index: Index, sizes: np.ndarray, sample: int) -> list[tuple[int, int, int]]:
    """Parts (document, first token, token after the last) of a sample, its shared last token included."""
    (first, start), (last, stop) = index.bounds[sample].tolist(), index.bounds[sample + 1].tolist()
    documents = index.documents[first : last + 1].tolist()
    ends = [*(int(sizes[document]) for document in documents[:-1]), stop + 1]
    return list(zip(documents, [start] + [0] * (len(documents) - 1), ends, strict=True))


def assemble(data: IndexedDataset, parts: list[tuple[int, int, int]], length: int, fill: int) -> np.ndarray:
    """Tokens of the parts, int64, cut or filled up to `length`."""
    out = np.full(length, fill, np.int64)
    at = 0
    for document, start, stop in parts:
        tokens = data[document][start : min(stop, start + length - at)]
        out[at : at + len(tokens)] = tokens
        at += len(tokens)
    return out
