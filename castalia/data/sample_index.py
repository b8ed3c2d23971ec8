"""Which tokens a sample holds: the document, sample and shuffle index of each way of packing.

Every function is pure and gives the arrays of the original bit for bit. S is the sequence length; a sample has S + 1
tokens, so that inputs and shifted labels both have S. Each item of a corpus counts as a document.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from castalia.config.schema import split_shares
from castalia.data.indexed import IndexedDataset
from castalia.errors import DataError

IGNORE = -100
BLOCK = 1 << 18


def split_bounds(split: str, num_documents: int) -> list[int]:
    """Borders [0, b1, b2, n] of train, valid and test documents for weights such as "969, 30, 1" or "8/1/1"."""
    try:
        weights = split_shares(split)
    except ValueError as error:
        raise DataError(f"data.split={split!r}: {error}") from None
    total, bounds = sum(weights), [0]
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
        return max(0, len(self.order) - 1)  # the original never uses the last one


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
    order = np.tile(documents.astype(np.int32, copy=False), epochs)
    rng.shuffle(order)
    count = (epochs * tokens - 1) // seq_length
    wide = 2 * ((epochs * tokens - 1) / seq_length + 1) >= np.iinfo(np.int32).max - 1
    bounds = np.empty((count + 1, 2), np.int64 if wide else np.int32)
    ends = np.empty(len(order), np.int64)
    for first in range(0, len(order), BLOCK):  # in blocks: the temporaries stay small beside the index
        ends[first : first + BLOCK] = sizes[order[first : first + BLOCK]]
    np.cumsum(ends, out=ends)
    for first in range(0, count + 1, BLOCK):
        cuts = np.arange(first, min(first + BLOCK, count + 1), dtype=np.int64) * seq_length
        at = np.searchsorted(ends, cuts, side="right")
        bounds[first : first + len(cuts), 0] = at
        bounds[first : first + len(cuts), 1] = cuts - np.where(at > 0, ends[at - 1], 0)
    del ends
    shuffle = np.arange(count, dtype=np.uint32 if count < np.iinfo(np.uint32).max - 1 else np.int64)
    rng.shuffle(shuffle)
    return Index(order, bounds, shuffle)


def trainable(labels: IndexedDataset, documents: np.ndarray, length: int) -> np.ndarray:
    """Which documents have a label that is not masked among their first `length`; bool [documents]."""
    found = ((labels[document][:length] != IGNORE).any() for document in documents)
    return np.fromiter(found, bool, len(documents))


def build_unpacked(documents: np.ndarray, num_samples: int, seed: int) -> Index:
    """One document a sample, in turn. `documents` are those that may be used."""
    order = np.arange(num_samples)
    np.random.RandomState(seed).shuffle(order)
    starts = np.arange(num_samples + 1)
    bounds = np.stack([starts, np.zeros_like(starts)], axis=1)
    return Index(_some(documents)[starts % len(documents)].astype(np.int64), bounds, order)


def build_overflowing(
    sizes: np.ndarray, documents: np.ndarray, usable: np.ndarray, num_samples: int, seq_length: int, seed: int
) -> Index:
    """Whole documents, a new sample wherever the next one would exceed S + 1 tokens.

    All `documents` are shuffled anew for each pass; those outside the mask `usable` [documents] are then left out.
    As in the original, the last sample has one document and its end lies behind the last document.
    """
    _some(documents[usable])
    rng = np.random.RandomState(seed)
    order = np.arange(num_samples)
    rng.shuffle(order)
    turns = np.arange(len(documents))
    passes: list[np.ndarray] = []
    starts: list[int] = []
    before, room = 0, -1  # documents of earlier passes; tokens that the sample left open can still take
    while len(starts) < num_samples:
        rng.shuffle(turns)
        chosen = documents[turns[usable[turns]]]
        ends = np.cumsum(sizes[chosen], dtype=np.int64)
        begins = ends - sizes[chosen]
        following = np.searchsorted(ends, begins + seq_length + 1, side="right")
        following = np.maximum(following, np.arange(1, len(chosen) + 1))  # a long document has a sample of its own
        first = int(np.searchsorted(ends, room, side="right"))
        room -= int(ends[-1])
        while first < len(chosen):
            starts.append(before + first)
            room = seq_length + 1 - int(ends[-1] - begins[first])
            first = int(following[first])
        passes.append(chosen)
        before += len(chosen)
    count = starts[num_samples - 1] + 1 if num_samples else 0
    borders = np.array([*starts[:num_samples], count], np.int64)
    bounds = np.stack([borders, np.zeros_like(borders)], axis=1)
    return Index(np.concatenate([*passes, np.empty(0, np.int64)])[:count].astype(np.int64), bounds, order)


def _some(documents: np.ndarray) -> np.ndarray:
    if not len(documents):
        raise DataError(
            "no document can be trained on: all are masked within the sequence length or, with "
            "data.allow_chopped=false, longer than a sample"
        )
    return documents


def locate(index: Index, position: int) -> int:
    """Sample at a position of the data order. A position or sample that runs off the end is taken modulo the length,
    as often as needed: the original's retry rule, which decides what late positions of a blend hold."""
    if len(index) < 1:
        raise DataError(
            f"{len(index.documents)} documents do not give one whole sample: use more data or a smaller data.seq_length"
        )
    for _ in range(3):  # only the last sample can run off the end, and position 0 is where it leads
        if position < len(index.order):
            position = int(index.order[position])
            if index.bounds[position + 1, 0] < len(index.documents):
                return position
        position %= len(index)
    return int(index.order[1])  # position 0 holds that very sample: the original never comes back from here


def pieces(index: Index, sizes: np.ndarray, sample: int) -> list[tuple[int, int, int]]:
    """Parts (document, first token, token after the last) of a sample, its shared last token included."""
    (first, start), (last, stop) = index.bounds[sample].tolist(), index.bounds[sample + 1].tolist()
    documents = index.documents[first : last + 1].tolist()
    ends = [*(int(sizes[document]) for document in documents[:-1]), stop + 1]
    return list(zip(documents, [start] + [0] * (len(documents) - 1), ends, strict=True))


def assemble(
    data: IndexedDataset, parts: list[tuple[int, int, int]], length: int, fill: int, dtype: type = np.int64
) -> np.ndarray:
    """Tokens of the parts, cut or filled up to `length`."""
    out: np.ndarray = np.full(length, fill, dtype)
    at = 0
    for document, start, stop in parts:
        tokens = data[document][start : min(stop, start + length - at)]
        out[at : at + len(tokens)] = tokens
        at += len(tokens)
    return out


def number_documents(parts: list[tuple[int, int, int]], length: int) -> np.ndarray:
    """The number of the part, from 0, that each token of a sample belongs to; what fills it up counts as one more."""
    numbers = np.full(length, len(parts), np.int64)
    at = 0
    for number, (_, start, stop) in enumerate(parts):
        numbers[at : at + stop - start] = number
        at += stop - start
    return numbers
