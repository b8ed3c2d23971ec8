"""Batches as pure functions of config and step: there is no state, so resuming at any step costs nothing.

Step t takes positions [t * B, (t + 1) * B) of the data order, in every layout and with every micro-batch size. With a
batch-size warm-up, the smaller batches of the first steps follow each other without gaps, too. At the end of the data
the order starts again, without the incomplete micro-batch at its end, as in GPT-NeoX's loader.

    step -> positions -> (corpus, position in it) -> sample -> parts of documents -> tokens, labels, loss mask
            data order   blend.py                    sample_index.py                 indexed.py
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, cycle, islice, pairwise
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np

from castalia.bars import Advance, unseen
from castalia.config.batch import size_at, steps_within, sum_until
from castalia.config.schema import EarlierBatch, Warmup
from castalia.data.indexed import IndexedDataset, dataset_fingerprint
from castalia.data.interventions import Intervention, Interventions
from castalia.data.sample_index import (
    IGNORE,
    Index,
    assemble,
    locate,
    number_documents,
    pieces,
)
from castalia.errors import DataError

log = logging.getLogger(__name__)
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


T = TypeVar("T")


class Later(Generic[T]):
    """What takes long to make, and is made when it is first asked for."""

    def __init__(self, make: Callable[[Advance], T]) -> None:
        self._make, self._made = make, False

    def __call__(self, advance: Advance = unseen) -> T:
        """The value; `advance` moves a bar on while it is made."""
        if not self._made:
            self._value, self._made = self._make(advance), True
        return self._value


class Batch(NamedTuple):
    """Arrays [sequences, tokens]. `labels` are already shifted: labels[:, t] is the token after tokens[:, t]."""

    tokens: np.ndarray  # int64
    labels: np.ndarray  # int64, -100 where no loss is taken
    loss_mask: np.ndarray  # bool, labels != -100
    documents: np.ndarray | None = None  # int64, number of the document within the row; None: no document mask
    references: np.ndarray | None = None  # float32 [sequences]: log-probability of the labels by the reference model
    rewards: np.ndarray | None = None  # float32 [sequences]: above 0 wanted texts, below 0 unwanted ones
    whole: np.ndarray | None = None  # int64, labels of all tokens of the texts, those before an answer included
    weights: np.ndarray | None = None  # float32 [sequences]: factors of their losses; None: all are 1


class DocumentPiece(NamedTuple):
    """A part of a sample: the tokens [start, stop) of a document of the corpus `prefix`."""

    prefix: str
    document: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class SampledCorpus:
    """One corpus, its samples, and what else is stored for each of its documents."""

    text: IndexedDataset
    labels: IndexedDataset | None
    later_index: Later[Index]
    references: IndexedDataset | None = None  # number t is the log-probability of token t + 1
    rewards: IndexedDataset | None = None  # one number for each document
    alone: bool = False  # a sample is exactly one document, without the first token of the next one

    @property
    def index(self) -> Index:
        """The samples and their order. The first call builds the index or reads its files."""
        return self.later_index()

    def parts(self, position: int) -> list[tuple[int, int, int]]:
        """The parts (document, first token, end) of the sample at a position of this corpus's order."""
        parts = pieces(self.index, self.text.sizes, locate(self.index, position))
        return parts[:1] if self.alone else parts

    @cached_property
    def epochs(self) -> float:
        """Passes over the documents that the index holds."""
        taken = np.zeros(len(self.text), bool)
        taken[self.index.documents] = True
        return len(self.index.documents) / max(1, int(taken.sum()))

    def reference(self, parts: list[tuple[int, int, int]], labels: np.ndarray) -> float:
        """Log-probability of a sample's shifted labels [length] by the reference model."""
        assert self.references is not None
        log_probs = assemble(self.references, parts, len(labels), fill=0, dtype=np.float64)
        return float(log_probs[labels != IGNORE].sum())

    def reward(self, parts: list[tuple[int, int, int]]) -> float:
        """The reward of the document that a sample consists of."""
        assert self.rewards is not None
        return float(self.rewards[parts[0][0]][0])


@dataclass(frozen=True, eq=False)
class Samples:
    """All samples of one split in data order. `batch(k)` is the batch of step k, or the k-th batch of an evaluation."""

    corpora: tuple[SampledCorpus, ...]
    later_blend: Later[tuple[np.ndarray, np.ndarray]] | None  # None: there is one corpus
    seq_length: int
    batch_size: int
    unit: int  # a pass over the data order takes a multiple of this many sequences
    vocab_size: int | None
    masked_after: int | None  # no loss on the token after this one
    mask_documents: bool  # tokens see only their own document, and no token predicts the first of the next document
    exact: bool  # train on the padding after the end of a text without labels, as GPT-NeoX does
    length_warmup: Warmup | None = None  # training only: batches hold the beginnings of the samples
    batch_warmup: Warmup | None = None  # training only
    earlier: tuple[EarlierBatch, ...] = ()  # training only: batch sizes of the steps before a change
    cut: bool = False  # tokens beyond the length of a sample are never seen, instead of being the next one's
    has_whole: bool = False  # batches hold `whole`, which some objectives learn as well
    interventions: Interventions | None = None  # training only
    # Training only: the first step, from 0, of each stage of the data, and its samples, which count steps as these do.
    stages: tuple[tuple[int, Samples], ...] = ()

    def at(self, step: int) -> Samples:
        """The samples that a step, from 0, takes its batch from: these, or those of the stage that it lies in."""
        return next((stage for first, stage in reversed(self.stages) if first <= step), self)

    def spans(self, steps: int) -> Iterator[tuple[range, Samples]]:
        """The first `steps` steps, from 0, by stages, and the samples of each."""
        ends = [0, *(min(first, steps) for first, _ in self.stages), steps]
        for (begin, end), samples in zip(pairwise(ends), (self, *(stage for _, stage in self.stages)), strict=True):
            if begin < end:
                yield range(begin, end), samples

    def __len__(self) -> int:
        return len(self.blended[0]) if self.blended else len(self.corpora[0].index)

    @property
    def blended(self) -> tuple[np.ndarray, np.ndarray] | None:
        """For each position of the data order its corpus and the position there; None if there is one corpus."""
        return self.later_blend() if self.later_blend else None

    def build_index(self, advance: Advance = unseen) -> None:
        """Builds the index or reads its files, which takes minutes for billions of tokens. Else whatever needs it does.

        `advance` counts rows of the index, or files of an index that is there.
        """
        for corpus in self.corpora:
            corpus.later_index(advance)
        if self.later_blend:
            self.later_blend(advance)
        for _, stage in self.stages:
            stage.build_index(advance)

    def steps(self, epochs: int) -> int:
        """The number of whole steps in `epochs` passes over the data order."""
        return steps_within(self.batch_warmup, epochs * self.pass_length, self.batch_size, self.earlier)

    @property
    def pass_length(self) -> int:
        """Samples of one pass over the data order."""
        return len(self) - len(self) % self.unit

    def positions(self, step: int) -> np.ndarray:
        """The positions of the data order that a step takes: [sequences]; of its stage's order if there are stages.

        Raises DataError if the samples do not fill one micro-batch over all ranks.
        """
        if (stage := self.at(step)) is not self:
            return stage.positions(step)
        if not self.pass_length:
            raise DataError(
                f"{len(self)} samples do not fill one micro-batch of {self.unit} sequences over all ranks: "
                "use more data"
            )
        return np.arange(self.first_of(step), self.first_of(step + 1)) % self.pass_length

    def first_of(self, step: int) -> int:
        """The number of sequences in all steps before a step (from 0)."""
        return sum_until(self.batch_warmup, step, self.batch_size, self.earlier)

    def epoch(self, sequence: int) -> int:
        """The pass over its corpus in which a sequence comes, from 1, by how much of the order lies before it.

        `sequence` counts those of all steps. In GPT-NeoX's order passes are mixed: all documents come as often in the
        end, but one may come again before another was seen.
        """
        turn, position = divmod(sequence, self.pass_length)
        corpus, position = self._corpus(position)
        before = position * corpus.epochs / max(1, len(corpus.index.order))
        return 1 + turn * math.ceil(corpus.epochs) + int(before + 1e-9)

    def length(self, step: int) -> int:
        """Tokens of a sequence in the batch of a step."""
        return size_at(self.length_warmup, step, self.at(step).seq_length)

    def pieces(self, position: int) -> list[DocumentPiece]:
        """Where the tokens of the sample at a position of the data order lie."""
        corpus, position = self._corpus(position)
        return [DocumentPiece(corpus.text.prefix, *part) for part in corpus.parts(position)]

    def _corpus(self, position: int) -> tuple[SampledCorpus, int]:
        if not self.blended:
            return self.corpora[0], position
        return self.corpora[int(self.blended[0][position])], int(self.blended[1][position])

    def sample(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a sample and its labels before they are shifted, both int64 [seq_length + 1]."""
        corpus, position = self._corpus(position)
        return self._sample(corpus, corpus.parts(position), self.seq_length + 1)

    def _sample(
        self, corpus: SampledCorpus, parts: list[tuple[int, int, int]], length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        text = assemble(corpus.text, parts, length, fill=0)
        if corpus.labels is not None:
            return text, assemble(corpus.labels, parts, length, fill=IGNORE)
        labels = text.copy()
        if not self.exact:
            labels[sum(stop - start for _, start, stop in parts) :] = IGNORE
        return text, labels

    def batch(self, step: int, rows: Sequence[int] | np.ndarray | None = None) -> Batch:
        """The batch of a step, or the given rows of it. Raises DataError if a token is beyond the vocabulary."""
        if (stage := self.at(step)) is not self:
            return stage.batch(step, rows)
        positions = self.positions(step)
        numbers = np.arange(len(positions)) if rows is None else np.arange(len(positions))[rows]
        corpora = (self._corpus(int(position)) for position in positions[numbers])
        samples = [(corpus, corpus.parts(position)) for corpus, position in corpora]
        changes = [self.change(step, int(row)) for row in numbers]
        return self._assembled(samples, self.length(step) + 1, f"step {step}", changes)

    def change(self, step: int, row: int) -> Intervention | None:
        """The intervention on a row of a step, both from 0."""
        return self.interventions.rows.get((step, row)) if self.interventions else None

    def whole_pass(self, rows: int, multiple: int = 1, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Batches of `rows` samples, with every usable document once, each in samples of its own.

        A number of samples that is not a multiple of `multiple` is filled up with the first ones. With `ranks`, each
        takes an equal share of a batch, for which `multiple` and `rows` must be multiples of their number.
        """
        every = [
            (corpus, parts)
            for corpus in self.corpora
            for document in np.unique(corpus.index.documents).tolist()
            for parts in self._alone(int(corpus.text.sizes[document]), document)
        ]
        filled = chain(every, islice(cycle(every), -len(every) % multiple))
        while samples := list(islice(filled, rows)):
            yield self._assembled(samples[rank::ranks], self.seq_length + 1, "validation")

    def whole_pass_batches(self, rows: int, multiple: int = 1) -> int:
        """The number of batches of `whole_pass`."""
        count = 0
        for corpus in self.corpora:
            sizes = corpus.text.sizes[np.unique(corpus.index.documents)].astype(np.int64)
            count += len(sizes) if self.cut else int(np.maximum(1, -(-(sizes - 1) // self.seq_length)).sum())
        return -(-(count + -count % multiple) // rows)

    def _alone(self, size: int, document: int) -> Iterator[list[tuple[int, int, int]]]:
        """The parts of the samples that hold a document alone."""
        for start in range(0, 1 if self.cut else max(1, size - 1), self.seq_length):
            yield [(document, start, min(size, start + self.seq_length + 1))]

    def _assembled(
        self,
        samples: list[tuple[SampledCorpus, list[tuple[int, int, int]]]],
        length: int,
        where: str,
        changes: Sequence[Intervention | None] = (),
    ) -> Batch:
        """The batch of these samples, each a corpus and the parts of its documents, of `length` tokens with labels.

        `changes`: the intervention on each sample, if there are any.
        """
        text = np.empty((len(samples), length), np.int64)
        labels = np.empty_like(text)
        documents = np.empty_like(text) if self.mask_documents else None
        whole = np.full_like(text, IGNORE) if self.has_whole else None
        for row, (corpus, parts) in enumerate(samples):
            text[row], labels[row] = self._sample(corpus, parts, length)
            if documents is not None:
                documents[row] = number_documents(parts, length)
            if whole is not None:
                end = sum(stop - start for _, start, stop in parts)
                whole[row, :end] = text[row, :end]
            if change := changes[row] if changes else None:
                change.apply(text[row], labels[row])
                if documents is not None and change.ids is not None:
                    documents[row] = np.arange(length) >= len(change.ids)  # one document, and what fills up
        self._check_vocabulary(where, samples, text, changes)
        tokens, labels = np.ascontiguousarray(text[:, :-1]), np.ascontiguousarray(labels[:, 1:])
        labels[labels < 0] = IGNORE  # GPT-NeoX masks every negative label
        if self.masked_after is not None:
            labels[tokens == self.masked_after] = IGNORE
        if documents is not None:
            labels[documents[:, 1:] != documents[:, :-1]] = IGNORE
            documents = np.ascontiguousarray(documents[:, :-1])
        references = rewards = None
        if all(corpus.references for corpus in self.corpora):
            sums = (corpus.reference(parts, row) for (corpus, parts), row in zip(samples, labels, strict=True))
            references = np.fromiter(sums, np.float32, len(samples))
        if all(corpus.rewards for corpus in self.corpora):
            rewards = np.array([corpus.reward(parts) for corpus, parts in samples], np.float32)
        whole = None if whole is None else np.ascontiguousarray(whole[:, 1:])
        weights = None
        if any(change and change.weight != 1.0 for change in changes):
            weights = np.array([change.weight if change else 1.0 for change in changes], np.float32)
        return Batch(tokens, labels, labels != IGNORE, documents, references, rewards, whole, weights)

    def _check_vocabulary(
        self,
        where: str,
        samples: list[tuple[SampledCorpus, list[tuple[int, int, int]]]],
        text: np.ndarray,
        changes: Sequence[Intervention | None],
    ) -> None:
        limit = self.vocab_size or np.iinfo(np.int64).max
        if text.min() < 0 or text.max() >= limit:
            bad = (text < 0) | (text >= limit)
            row, at = (int(where) for where in np.argwhere(bad)[0])
            if changes and (change := changes[row]) and change.ids is not None:
                assert self.interventions is not None
                raise DataError(
                    f"{where}: token id {text[bad][0]} of row {row} in {self.interventions.path} lies beyond the "
                    f"vocabulary of {self.vocab_size}"
                )
            corpus, parts = samples[row]
            for part in parts:
                if at < part[2] - part[1]:
                    break
                at -= part[2] - part[1]
            raise DataError(
                f"{where}: token id {text[bad][0]} lies beyond the vocabulary of {self.vocab_size}; "
                f"it is token {part[1] + at} of document {part[0]} of {corpus.text.prefix}: "
                "prepare the corpus with the tokenizer of this config"
            )

    @property
    def fingerprint(self) -> str:
        """A digest that changes with the files, and with every setting that decides order or content of the samples."""
        return self.fingerprint_until(None)

    def fingerprint_until(self, step: int | None) -> str:
        """The digest with the interventions and stages of the first steps alone; None: of all."""
        changes = self.interventions.digest(step) if self.interventions else ""
        for first, stage in self.stages:
            if step is None or first < step:
                changes += f" {first} {stage._order_fingerprint}"
        if not changes:
            return self._order_fingerprint
        return hashlib.blake2b(f"{self._order_fingerprint} {changes}".encode(), digest_size=16).hexdigest()

    @cached_property
    def _order_fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for corpus in self.corpora:
            digest.update(dataset_fingerprint(corpus.text).encode())
            digest.update(dataset_fingerprint(corpus.labels).encode() if corpus.labels else b"-")
            for further in filter(None, (corpus.references, corpus.rewards)):
                digest.update(dataset_fingerprint(further).encode())
            for array in (corpus.index.documents, corpus.index.bounds[-1:], corpus.index.order[:1024]):
                digest.update(np.ascontiguousarray(array).data)
            digest.update(len(corpus.index.order).to_bytes(8, "little"))
        for array in self.blended or ():
            digest.update(np.ascontiguousarray(array).data)
        digest.update(f"{self.seq_length} {self.masked_after} {self.mask_documents}".encode())
        for warmup in filter(None, (self.length_warmup, self.batch_warmup)):
            digest.update(f"{warmup}".encode())
        return digest.hexdigest()
