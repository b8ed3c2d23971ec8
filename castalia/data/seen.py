"""Where a run or a published suite trains on a text: every place, in the order of training.

The token ids are read once, from begin to end, in the order in which they lie in their files. What is found there is
then looked up in the order of the samples.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from castalia.bars import Advance, unseen
from castalia.data.indexed import IndexedDataset
from castalia.data.interventions import Interventions
from castalia.data.loader import SampledCorpus, Samples
from castalia.data.pairs import Pairs, sides_of
from castalia.data.published_rows import ParquetRows, ShardedRows
from castalia.data.sample_index import locate
from castalia.data.text_search import SoughtText, find_texts, wanted
from castalia.data.tokenizer import Tokenizer

TOKENS_AT_ONCE = 1 << 22


class Sighting(NamedTuple):
    """A text among what a run trains on."""

    step: int  # from 1
    row: int  # sequence of the step, from 0
    offset: int  # token of the sequence
    tokens: int  # of the text, with those that it shares with its surroundings
    position: int  # of the data order
    prefix: str  # the corpus, or the files
    document: int | None  # of the corpus
    start: int | None  # token of the document


@dataclass
class Sightings:
    """All places of a text, in the order of training."""

    text: str
    places: list[Sighting] = field(default_factory=list)
    cut: int = 0  # times that a sequence ends within the text, so that no sequence holds all of it
    anywhere: bool = True  # found whatever stands beside it; False: only where its ids are those of the text alone


class _Hit(NamedTuple):
    text: int
    document: int
    start: int
    stop: int


def seen_in_run(
    samples: Samples | Pairs, steps: int, texts: Sequence[str], tokenizer: Tokenizer, advance: Advance = unseen
) -> list[Sightings]:
    """Where the first `steps` steps of a run train on the texts. Within a document, not across the border of two."""
    asked = [wanted(text, tokenizer) for text in texts]
    sightings = [Sightings(text.text, anywhere=bool(text.core)) for text in asked]
    known: dict[str, list[_Hit]] = {}  # by prefix: stages of the data may share corpora
    for side in sides_of(samples).values():
        for span, stage in side.spans(steps):
            for number, corpus in enumerate(stage.corpora):
                prefix = corpus.text.prefix
                if prefix not in known:
                    known[prefix] = list(_hits(corpus.text, asked, tokenizer, advance))
                _look_up(stage, number, span, known[prefix], sightings)
    if isinstance(samples, Samples) and samples.interventions:
        _with_replaced(samples, samples.interventions, asked, tokenizer, sightings)
    return _sorted(sightings)


def bytes_to_read(samples: Samples | Pairs, steps: int) -> int:
    """The bytes of the corpora that `seen_in_run` reads for the first `steps` steps."""
    spans = (stage for side in sides_of(samples).values() for _, stage in side.spans(steps))
    return sum({each.text.prefix: each.text.tokens.nbytes for stage in spans for each in stage.corpora}.values())


def _with_replaced(
    samples: Samples,
    changes: Interventions,
    asked: Sequence[SoughtText],
    tokenizer: Tokenizer,
    found: list[Sightings],
) -> None:
    """Take out what stands in rows that interventions replace, and add what these hold instead."""
    replaced = {place: change.ids for place, change in changes.rows.items() if change.ids is not None}
    for sightings in found:
        sightings.places = [place for place in sightings.places if (place.step - 1, place.row) not in replaced]
    for (step, row), ids in replaced.items():
        tokens = np.array(ids[: samples.length(step) + 1])
        for hit in find_texts(tokens, asked, tokenizer, np.array([0, len(tokens)])):
            position, size = int(samples.positions(step)[row]), hit.stop - hit.start
            place = Sighting(step + 1, row, hit.start, size, position, changes.path, None, None)
            found[hit.text].places.append(place)


def seen_in_rows(
    rows: ShardedRows | ParquetRows, texts: Sequence[str], tokenizer: Tokenizer, advance: Advance = unseen
) -> list[Sightings]:
    """Where the rows that are here hold the texts. A row holds what it holds, with the borders of documents in it."""
    asked = [wanted(text, tokenizer) for text in texts]
    sightings = [Sightings(text.text, anywhere=bool(text.core)) for text in asked]
    for block in rows.blocks():
        for hit in find_texts(block.tokens, asked, tokenizer, block.starts):
            at = bisect_right(block.starts, hit.start) - 1  # type: ignore[arg-type]
            step, row = int(block.steps[at]), int(block.rows[at])
            place = Sighting(
                step=step + 1,
                row=row,
                offset=hit.start - int(block.starts[at]),
                tokens=hit.stop - hit.start,
                position=step * rows.batch_size + row,
                prefix=block.source,
                document=None,
                start=None,
            )
            sightings[hit.text].places.append(place)
        advance(block.tokens.nbytes)
    return _sorted(sightings)


def _sorted(found: list[Sightings]) -> list[Sightings]:
    for sightings in found:
        sightings.places.sort()
    return found


def _hits(
    corpus: IndexedDataset, asked: Sequence[SoughtText], tokenizer: Tokenizer, advance: Advance
) -> Iterator[_Hit]:
    """The texts in the documents of a corpus, in the order of its file."""
    limits = np.concatenate([corpus.starts // corpus.dtype.itemsize, [len(corpus.tokens)]])
    longest = max(max(len(needle) for needle in text.needles) + 2 * text.margin for text in asked)
    for begin in range(0, len(corpus.tokens), TOKENS_AT_ONCE):
        end = begin + TOKENS_AT_ONCE
        first, last = max(0, begin - longest), min(len(corpus.tokens), end + longest)
        low, high = np.searchsorted(limits, (first, last), side="right")
        inner = np.concatenate([[first], limits[low:high], [last]]) - first
        for hit in find_texts(corpus.tokens[first:last], asked, tokenizer, inner):
            if begin <= first + hit.start < end:  # otherwise it is another block's
                document = int(np.searchsorted(limits, first + hit.start, side="right")) - 1
                start = first + hit.start - int(limits[document])
                yield _Hit(hit.text, document, start, start + hit.stop - hit.start)
        advance((min(end, len(corpus.tokens)) - begin) * corpus.dtype.itemsize)


def _look_up(samples: Samples, number: int, steps: range, hits: list[_Hit], found: list[Sightings]) -> None:
    """Add the places of what was found in a corpus, and count what sequences cut."""
    corpus = samples.corpora[number]
    if not hits:
        return
    by_document: dict[int, list[_Hit]] = {}
    for hit in hits:
        by_document.setdefault(hit.document, []).append(hit)
    taken = samples.first_of(steps.stop)  # sequences of all steps until there
    for position, parts in _positions(samples, number, _candidates(corpus, by_document), taken):
        for hit, offset, whole in _within(parts, by_document):
            for step, row in _times(samples, position, steps, taken):
                length, size = samples.length(step), hit.stop - hit.start
                if whole and offset + size <= length + 1:
                    place = Sighting(step + 1, row, offset, size, position, corpus.text.prefix, hit.document, hit.start)
                    found[hit.text].places.append(place)
                elif offset < length:  # what begins with the last token is the next sequence's
                    found[hit.text].cut += 1


def _candidates(corpus: SampledCorpus, by_document: dict[int, list[_Hit]]) -> np.ndarray:
    """Samples of a corpus that may hold one of its hits."""
    index = corpus.index
    reading = np.flatnonzero(_isin(index.documents, np.fromiter(by_document, np.int64)))  # in reading order
    each = [(at, hit.start) for at in reading.tolist() for hit in by_document[int(index.documents[at])]]
    at, start = np.array(each, np.int64).reshape(-1, 2).T
    rows = np.ascontiguousarray(index.bounds[:, 0])
    # Bounds are in order of (place in reading order, token): the last one that is not behind the hit begins its sample.
    left, right = np.searchsorted(rows, at, "left"), np.searchsorted(rows, at, "right")
    within = [
        bisect_right(index.bounds[low:high, 1], token) for low, high, token in zip(left, right, start, strict=True)
    ]
    sample = left + np.array(within, np.int64) - 1
    # Neighbours share a token, so a hit that begins with the first token of a sample may end the one before.
    both = np.unique(np.concatenate([sample, sample - 1]))
    return both[(both >= 0) & (both < len(index.bounds) - 1)]


def _isin(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    table = np.zeros(int(values.max()) + 1, bool) if len(values) else np.zeros(0, bool)
    table[chosen[chosen < len(table)]] = True
    return table[values]


def _positions(
    samples: Samples, number: int, candidates: np.ndarray, taken: int
) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
    """Positions of the data order at which one of these samples of corpus `number` stands, with the sample's parts."""
    corpus = samples.corpora[number]
    index, last = corpus.index, len(corpus.index.order) - 1
    is_candidate = np.zeros(len(index.order), bool)
    is_candidate[candidates] = True
    is_candidate[last] = True  # GPT-NeoX has a rule for what stands in place of the last one: see `locate`
    known = set(candidates.tolist())
    end = min(samples.pass_length, taken)
    for first in range(0, end, TOKENS_AT_ONCE):
        places = np.arange(first, min(end, first + TOKENS_AT_ONCE))
        inner = places
        if samples.blended:
            places = places[samples.blended[0][places] == number]
            inner = samples.blended[1][places]
        inner = np.where(inner < len(index.order), inner, inner % max(1, len(index)))
        chosen = is_candidate[index.order[inner]]
        for position, place in zip(places[chosen].tolist(), inner[chosen].tolist(), strict=True):
            if locate(index, place) in known:
                yield position, corpus.parts(place)


def _within(parts: list[tuple[int, int, int]], by_document: dict[int, list[_Hit]]) -> Iterator[tuple[_Hit, int, bool]]:
    """The hits that begin in a sample of these parts: hit, token of the sample, whether all of it is in the sample."""
    at = 0
    for document, start, stop in parts:
        for hit in by_document.get(document, ()):
            if start <= hit.start < stop:
                yield hit, at + hit.start - start, hit.stop <= stop
        at += stop - start


def _times(samples: Samples, position: int, steps: range, taken: int) -> Iterator[tuple[int, int]]:
    """The (step, row) of each time that these steps train on a position of the data order."""
    for sequence in range(position, taken, samples.pass_length):
        step = bisect_right(range(steps.stop + 1), sequence, key=samples.first_of) - 1
        if step in steps:
            yield step, sequence - samples.first_of(step)
