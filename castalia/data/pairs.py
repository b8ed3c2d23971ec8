"""Pairs of a preferred and a rejected text, for preference tuning: two corpora that are read in the same order."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from castalia.bars import Advance, unseen
from castalia.config.objective import PAIRED
from castalia.config.schema import RunConfig, Source, Text
from castalia.data.config_corpora import open_data, open_labels, warn_of_lost_labels, with_judgements
from castalia.data.indexed import IndexedDataset, open_dataset
from castalia.data.loader import Batch, DocumentPiece, Later, SampledCorpus, Samples, Split
from castalia.data.sample_index import Index, build_unpacked, trainable
from castalia.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Pairs:
    """`Samples` of two sides in the same order. The rows of a batch alternate: preferred, rejected, preferred, ..."""

    chosen: Samples
    rejected: Samples

    def __len__(self) -> int:
        return len(self.chosen)

    def steps(self, epochs: int) -> int:
        """The number of whole steps in `epochs` passes over the pairs."""
        return self.chosen.steps(epochs)

    def positions(self, step: int) -> np.ndarray:
        """The positions of the data order that a step takes, one for each pair: [pairs]."""
        return self.chosen.positions(step)

    def pieces(self, position: int) -> list[DocumentPiece]:
        """Where the tokens of both sides of a pair lie, preferred side first."""
        return self.chosen.pieces(position) + self.rejected.pieces(position)

    def batch(self, step: int, rows: Sequence[int] | np.ndarray | None = None) -> Batch:
        """The batch of a step, or the given pairs of it; it has two sequences for each pair."""
        sides = self.chosen.batch(step, rows), self.rejected.batch(step, rows)
        return Batch(*map(_interleaved, *sides))

    def whole_pass(self, rows: int, multiple: int = 1, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """As of `Samples`, for every usable pair."""
        sides = (side.whole_pass(rows, multiple, rank, ranks) for side in (self.chosen, self.rejected))
        for both in zip(*sides, strict=True):
            yield Batch(*map(_interleaved, *both))

    def fingerprint_until(self, step: int | None) -> str:
        """As of `Samples`; pairs have no interventions."""
        return self.fingerprint

    def build_index(self, advance: Advance = unseen) -> None:
        """As of `Samples`; both sides share an index, which is small."""
        self.chosen.build_index(advance)
        self.rejected.build_index(advance)

    def whole_pass_batches(self, rows: int, multiple: int = 1) -> int:
        """As of `Samples`, for every usable pair."""
        return self.chosen.whole_pass_batches(rows, multiple)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the files and settings that decide order and content of the pairs."""
        both = self.chosen.fingerprint + self.rejected.fingerprint
        return hashlib.blake2b(both.encode(), digest_size=16).hexdigest()


def _interleaved(chosen: Any, rejected: Any) -> Any:
    """[n, ...], [n, ...] -> [2 n, ...], rows of both sides in turn; None if a side has no such array."""
    if chosen is None or rejected is None:
        return None
    return np.stack([chosen, rejected], axis=1).reshape(-1, *chosen.shape[1:])  # [n, 2, ...] -> [2 n, ...]


def sides_of(samples: Samples | Pairs) -> dict[str, Samples]:
    """The sides of pairs by name. Plain samples have a single side, whose name is empty."""
    if isinstance(samples, Pairs):
        return {"chosen": samples.chosen, "rejected": samples.rejected}
    return {"": samples}


def open_samples(config: RunConfig, split: Split = "train") -> Samples | Pairs:
    """The data of a run: pairs if `train.objective` learns from pairs, else sequences. Raises DataError."""
    return open_pairs(config, split) if config.train.objective in PAIRED else open_data(config, split)


def open_pairs(config: RunConfig, split: Split = "train") -> Pairs:
    """The pairs of a split whose two sides have an unmasked label within the sequence length.

    With data.allow_chopped=false both sides must also fit into it. Raises DataError if the two sides have different
    numbers of texts, or if a source names no rejected texts.
    """
    indices: dict[str, Later[Index]] = {}  # of the preferred side by source, which the rejected side shares

    def chosen(config: RunConfig, source: Source, text: IndexedDataset, wanted: int | None, name: str) -> SampledCorpus:
        """The preferred texts, with the index that both sides follow."""
        index = _index(config, source, wanted)
        indices[name] = Later(lambda advance: index)
        return with_judgements(SampledCorpus(text, open_labels(source, text), indices[name]), source)

    def rejected(
        config: RunConfig, source: Source, text: IndexedDataset, wanted: int | None, name: str
    ) -> SampledCorpus:
        """The rejected texts, in the order of the preferred ones."""
        return with_judgements(SampledCorpus(text, open_labels(source, text), indices[name]), source)

    sources: tuple[Source, ...] = getattr(config.data, split)
    others = tuple(Source(**_rejected(source).model_dump(), weight=source.weight) for source in sources)
    other_side = config.with_({f"data.{split}": others})
    return Pairs(open_data(config, split, chosen), open_data(other_side, split, rejected))


def _rejected(source: Source) -> Text:
    if source.rejected is None:
        raise DataError(f"{source.path} has no rejected texts: name their corpus as `rejected`")
    return source.rejected


def _index(config: RunConfig, source: Source, wanted: int | None) -> Index:
    """The index of both sides, in which each sample is one pair, in the order of GPT-NeoX."""
    sides, length = (source, _rejected(source)), config.data.seq_length
    texts = [open_dataset(side.path) for side in sides]
    if len(texts[0]) != len(texts[1]):
        raise DataError(
            f"{sides[0].path} holds {len(texts[0])} texts and {sides[1].path} {len(texts[1])}: each preferred text "
            "needs its rejected one at the same place"
        )
    if wanted is None:
        raise DataError(f"pairs have no epochs: give train.steps for {source.path}")
    documents = np.arange(len(texts[0]))
    usable = np.ones(len(documents), bool)
    for side, text in zip(sides, texts, strict=True):
        labels = open_labels(side, text)
        learnable = trainable(labels, documents, length) if labels is not None else text.sizes > 1
        warn_of_lost_labels(text, documents, learnable, length)
        usable &= learnable
        if not config.data.allow_chopped:
            usable &= text.sizes <= length + 1
    alike = np.flatnonzero(texts[0].sizes == texts[1].sizes)  # only these can be equal
    equal = sum(np.array_equal(texts[0][pair], texts[1][pair]) for pair in alike.tolist())
    if equal:
        log.warning(
            "%d of %d pairs of %s have equal sides, from which nothing is learned", equal, len(documents), source.path
        )
    index = build_unpacked(documents[usable], wanted, config.seed)
    return replace(index, order=index.order % len(documents))  # GPT-NeoX takes positions modulo the number of pairs
