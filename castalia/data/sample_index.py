"""Which tokens belong to which sample: the document, sample and shuffle index of each kind of packing.

    documents    order in which documents are read          3 0 2 1 ...
    bounds       where each sample begins and ends          |---|---|---|  every S tokens (packed)
    order        which sample comes at which position       5 1 4 ...

Every function is pure and gives the arrays of GPT-NeoX (gpt2_dataset.py and helpers.cpp) bit for bit. S is the sequence
length; a sample has S + 1 tokens, so that inputs and labels, which are shifted by one, both have S. Each item of a
corpus counts as a document.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from castalia.bars import Advance, unseen
from castalia.config.schema import split_shares
from castalia.data.indexed import IndexedDataset
from castalia.errors import DataError

IGNORE = -100
BLOCK = 1 << 18  # documents or samples that are worked on at a time


def split_bounds(split: str, num_documents: int) -> list[int]:
    """Bounds [0, b1, b2, n] of the train, valid and test documents, for shares such as "969, 30, 1" or "8/1/1".

    Raises DataError for text that is not a list of shares.
    """
    try:
        weights = split_shares(split)
    except ValueError as error:
        raise DataError(f"data.split={split!r}: {error}") from None
    total, bounds = sum(weights), [0]
    for weight in weights:
        bounds.append(bounds[-1] + int(round(weight / total * num_documents)))
    surplus = bounds[-1] - num_documents  # rounding may give or take a document; NeoX shifts all bounds by it
    return [0, *(bound - surplus for bound in bounds[1:])]


@dataclass(frozen=True, eq=False)
class Index:
    """The samples of one corpus, and their order."""

    documents: np.ndarray  # [positions]: ids of documents in reading order
    # [n + 1, 2]: sample k runs from row k to row k + 1, each (position in `documents`, token offset)
    bounds: np.ndarray
    order: np.ndarray  # [n]: the sample at each position of the data order

    def __len__(self) -> int:
        return max(0, len(self.order) - 1)  # GPT-NeoX never uses the last sample


def build_packed(
    sizes: np.ndarray,
    documents: np.ndarray,
    num_samples: int | None,
    seq_length: int,
    seed: int,
    advance: Advance = unseen,
) -> Index:
    """Packing: documents back to back, cut every S tokens. Neighbouring samples share a token.

    `sizes` [items] counts the tokens of every document of the corpus, `documents` are the ids of this split. There are
    as many whole epochs as `num_samples` needs, shuffled as one sequence; None means one epoch. `advance` counts the
    rows of `bounds` and `order`. Raises DataError if the documents have fewer than two tokens.
    """
    tokens = int(sizes[documents].sum(dtype=np.int64))
    if tokens < 2:
        raise DataError(f"{len(documents)} documents hold {tokens} tokens: nothing to train on")
    epochs = 1 if num_samples is None else max(1, -(-(num_samples * seq_length + 1) // tokens))
    rng = np.random.RandomState(seed)
    count = (epochs * tokens - 1) // seq_length
    advance(0, f"shuffling {epochs * len(documents):,} documents", 2 * count + 1)
    order = np.tile(documents.astype(np.int32, copy=False), epochs)
    rng.shuffle(order)
    # The dtypes are those of GPT-NeoX, as cached index files are shared with it.
    needs_int64 = 2 * ((epochs * tokens - 1) / seq_length + 1) >= np.iinfo(np.int32).max - 1
    bounds = np.empty((count + 1, 2), np.int64 if needs_int64 else np.int32)
    ends = np.empty(len(order), np.int64)  # tokens up to the end of each document, over all epochs
    for first in range(0, len(order), BLOCK):  # block by block, so that temporary arrays stay small
        ends[first : first + BLOCK] = sizes[order[first : first + BLOCK]]
    np.cumsum(ends, out=ends)
    for first in range(0, count + 1, BLOCK):
        cuts = np.arange(first, min(first + BLOCK, count + 1), dtype=np.int64) * seq_length
        at = np.searchsorted(ends, cuts, side="right")  # the document that holds the token at each cut
        bounds[first : first + len(cuts), 0] = at
        bounds[first : first + len(cuts), 1] = cuts - np.where(at > 0, ends[at - 1], 0)  # offset within that document
        advance(len(cuts), f"cutting {count:,} samples")
    del ends  # 8 bytes per document, before the shuffle index is allocated
    shuffle = np.arange(count, dtype=np.uint32 if count < np.iinfo(np.uint32).max - 1 else np.int64)
    advance(0, f"shuffling {count:,} samples")
    rng.shuffle(shuffle)  # one call, which takes about a second for ten million
    advance(count)
    return Index(order, bounds, shuffle)


def trainable(labels: IndexedDataset, documents: np.ndarray, length: int) -> np.ndarray:
    """Which documents have an unmasked label among their first `length` labels: bool [documents]."""
    has_labels = ((labels[document][:length] != IGNORE).any() for document in documents)
    return np.fromiter(has_labels, bool, len(documents))


def build_unpacked(documents: np.ndarray, num_samples: int, seed: int) -> Index:
    """No packing: each sample is one document. `documents` are the usable ones; they repeat until there are enough
    samples. Raises DataError if there are none."""
    order = np.arange(num_samples)
    np.random.RandomState(seed).shuffle(order)
    starts = np.arange(num_samples + 1)
    bounds = np.stack([starts, np.zeros_like(starts)], axis=1)
    return Index(_some(documents)[starts % len(documents)].astype(np.int64), bounds, order)


def build_overflowing(
    sizes: np.ndarray, documents: np.ndarray, usable: np.ndarray, num_samples: int, seq_length: int, seed: int
) -> Index:
    """Packing of whole documents: a new sample begins wherever the next document would exceed S + 1 tokens.

    All `documents` are shuffled anew for each pass; those outside the mask `usable` [documents] are then left out. As
    in GPT-NeoX, the last sample has one document, and its end lies behind the last document. Raises DataError if no
    document is usable.
    """
    _some(documents[usable])
    rng = np.random.RandomState(seed)
    order = np.arange(num_samples)
    rng.shuffle(order)
    turns = np.arange(len(documents))
    passes: list[np.ndarray] = []
    starts: list[int] = []
    before, room = 0, -1  # documents of earlier passes; tokens that still fit into the sample left open by them
    while len(starts) < num_samples:
        rng.shuffle(turns)
        chosen = documents[turns[usable[turns]]]
        ends = np.cumsum(sizes[chosen], dtype=np.int64)
        begins = ends - sizes[chosen]
        # following[d]: the first document that does not fit into a sample that begins with document d.
        following = np.searchsorted(ends, begins + seq_length + 1, side="right")
        following = np.maximum(following, np.arange(1, len(chosen) + 1))  # a document longer than S + 1 fills a sample
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
    """The sample at a position of the data order.

    A position or sample beyond the end is taken modulo the length, as often as needed. This is the retry rule of
    GPT-NeoX, which decides what late positions of a blend hold. Raises DataError if there is no whole sample.
    """
    if len(index) < 1:
        raise DataError(
            f"{len(index.documents)} documents do not give one whole sample: use more data or a smaller data.seq_length"
        )
    for _ in range(3):  # only the last sample can run off the end, and it leads to position 0
        if position < len(index.order):
            position = int(index.order[position])
            if index.bounds[position + 1, 0] < len(index.documents):
                return position
        position %= len(index)
    return int(index.order[1])  # position 0 holds the last sample itself, where GPT-NeoX retries for ever


def pieces(index: Index, sizes: np.ndarray, sample: int) -> list[tuple[int, int, int]]:
    """The parts (document, first token, end) of a sample, with the last token that it shares with its successor."""
    (first, start), (last, stop) = index.bounds[sample].tolist(), index.bounds[sample + 1].tolist()
    documents = index.documents[first : last + 1].tolist()
    ends = [*(int(sizes[document]) for document in documents[:-1]), stop + 1]
    return list(zip(documents, [start] + [0] * (len(documents) - 1), ends, strict=True))


def assemble(
    data: IndexedDataset, parts: list[tuple[int, int, int]], length: int, fill: int, dtype: type = np.int64
) -> np.ndarray:
    """The tokens of the parts, back to back, cut or filled up to `length`: [length]."""
    out: np.ndarray = np.full(length, fill, dtype)
    at = 0
    for document, start, stop in parts:
        tokens = data[document][start : min(stop, start + length - at)]
        out[at : at + len(tokens)] = tokens
        at += len(tokens)
    return out


def number_documents(parts: list[tuple[int, int, int]], length: int) -> np.ndarray:
    """The number of the part, from 0, that each token of a sample belongs to: [length]. Padding counts as one more."""
    numbers = np.full(length, len(parts), np.int64)
    at = 0
    for number, (_, start, stop) in enumerate(parts):
        numbers[at : at + stop - start] = number
        at += stop - start
    return numbers
