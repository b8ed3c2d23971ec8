"""Pairs of a preferred and a rejected text, packed alike: sample q holds the same pairs on both sides."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from castalia.config.schema import Source
from castalia.data.indexed import IndexedDataset, open_dataset
from castalia.data.loader import open_labels
from castalia.data.samples import (
    IGNORE,
    Index,
    assemble,
    build_overflowing,
    build_unpacked,
    locate,
    pieces,
    trainable,
)
from castalia.errors import DataError

log = logging.getLogger(__name__)


class Pair(NamedTuple):
    """One sample of both sides: int64 [seq_length + 1], labels aligned with the text and -100 where none counts."""

    pos: np.ndarray
    neg: np.ndarray
    pos_label: np.ndarray
    neg_label: np.ndarray


@dataclass(frozen=True, eq=False)
class Pairs:
    """All samples in data order. Positions beyond the end follow the rule of `samples.locate`."""

    texts: tuple[IndexedDataset, IndexedDataset]  # preferred, rejected
    labels: tuple[IndexedDataset | None, IndexedDataset | None]
    index: Index
    seq_length: int

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> Pair:
        sample, length = locate(self.index, position), self.seq_length + 1
        parts = [pieces(self.index, text.sizes, sample) for text in self.texts]
        pos, neg = (assemble(text, part, length, 0) for text, part in zip(self.texts, parts, strict=True))
        pos_label, neg_label = (
            # without labels of its own a text is its own label, and what fills it up counts for nothing
            assemble(text if label is None else label, part, length, IGNORE)
            for text, label, part in zip(self.texts, self.labels, parts, strict=True)
        )
        return Pair(pos, neg, pos_label, neg_label)


def open_pairs(
    pos: Source,
    neg: Source,
    num_samples: int,
    *,
    seq_length: int,
    seed: int,
    packing: Literal["pack_until_overflow", "unpacked"] = "unpacked",
    allow_chopped: bool = True,
) -> Pairs:
    """Pairs are packed by their longer side. DataError where the two corpora do not match.

    A pair is used if both sides have a label to learn from within the context, and, unless `allow_chopped`, fit in it.
    """
    texts = open_dataset(pos.path), open_dataset(neg.path)
    if len(texts[0]) != len(texts[1]):
        raise DataError(
            f"{pos.path} holds {len(texts[0])} texts and {neg.path} {len(texts[1])}: each preferred text needs its "
            "rejected one at the same place"
        )
    labels = tuple(open_labels(source, text) for source, text in zip((pos, neg), texts, strict=True))
    documents = np.arange(len(texts[0]))
    sizes = np.maximum(*(text.sizes for text in texts))
    usable = sizes <= seq_length + 1 if not allow_chopped else np.ones(len(documents), bool)
    for label in filter(None, labels):
        usable &= trainable(label, documents, seq_length + (packing != "unpacked"))
    equal = sum(np.array_equal(a, b) for a, b in zip(*texts, strict=True))
    if equal:
        log.warning("%d of %d pairs have equal sides, from which nothing is learned", equal, len(documents))
    if packing == "unpacked":
        index = build_unpacked(documents[usable], num_samples, seed)
    else:
        index = build_overflowing(sizes, documents, usable, num_samples, seq_length, seed)
    return Pairs(texts, (labels[0], labels[1]), index, seq_length)
