"""Against a search in every sequence of every step."""

from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from castalia.config.schema import TokenizerConfig, Warmup
from castalia.data import seen
from castalia.data.config_corpora import open_data
from castalia.data.published_rows import open_published
from castalia.data.seen import seen_in_rows, seen_in_run
from castalia.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.test_loader import config, corpus


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    """Each byte is a token, so that ids and texts are the same."""
    return load_tokenizer(TokenizerConfig(kind="bytes"))


def places_in_order(samples, steps: int, text: str) -> list[tuple[int, int, int, int, int]]:
    """(step, row, offset, document, start), found in each document's part of each sequence."""
    found = []
    needle = list(text.encode())
    for step in range(steps):
        for row, position in enumerate(samples.positions(step).tolist()):
            ids, at = samples.sample(position)[0][: samples.length(step) + 1].tolist(), 0
            for piece in samples.pieces(position):
                end = min(at + piece.stop - piece.start, len(ids))
                for start in range(at, end - len(needle) + 1):
                    if ids[start : start + len(needle)] == needle:
                        found.append((step + 1, row, start, piece.document, piece.start + start - at))
                at += piece.stop - piece.start
    return sorted(found)


def as_tuples(places) -> list[tuple[int, int, int, int, int]]:
    return [(p.step, p.row, p.offset, p.document, p.start) for p in places]


@example(
    documents=["ab", "aa", "aa", "aa", "aa", "aa"],  # the one document with the text is not read by then
    texts=["b"],
    packing="pack_until_overflow",
    length=3,
    steps=1,
    batch=1,
    warmup=False,
    parts=1,
    block=5,
)
@given(
    documents=st.lists(st.text("ab", min_size=2, max_size=14), min_size=4, max_size=10),
    texts=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3, unique=True),
    packing=st.sampled_from(["packed", "pack_until_overflow"]),
    length=st.integers(3, 8),
    steps=st.integers(1, 12),
    batch=st.integers(1, 3),
    warmup=st.booleans(),
    parts=st.integers(1, 2),
    block=st.sampled_from([5, 1 << 20]),
)
@settings(max_examples=30, deadline=None)
def test_the_places_are_those_of_every_sequence(
    tmp_path_factory, documents, texts, packing, length, steps, batch, warmup, parts, block
) -> None:
    letters = load_tokenizer(TokenizerConfig(kind="bytes"))
    folder = tmp_path_factory.mktemp("seen")
    items = [list(text.encode()) for text in documents]
    sources = [corpus(folder / str(part), items[part:]) for part in range(parts)]
    data = {"seq_length_warmup": Warmup(start=2, steps=5, multiple=1)} if warmup else {}
    run = config(*sources, steps=steps, batch=batch, length=length, packing=packing, **data)
    samples = open_data(run.with_({"model.vocab_size": 256}))
    assume(samples.pass_length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seen, "TOKENS_AT_ONCE", block)
        found = seen_in_run(samples, steps, texts, letters)
    for text, sightings in zip(texts, found, strict=True):
        assert sightings.text == text
        assert as_tuples(sightings.places) == places_in_order(samples, steps, text)


def test_later_passes_over_the_data_see_a_text_again(tmp_path: Path, letters: Tokenizer) -> None:
    run = config(corpus(tmp_path / "x", [list(b"abcdefghijklmnop")] * 3), steps=None, batch=2, length=4)
    samples = open_data(run.with_({"model.vocab_size": 256}))
    steps = 3 * samples.steps(1)
    (found,) = seen_in_run(samples, steps, ["fg"], letters)
    assert as_tuples(found.places) == places_in_order(samples, steps, "fg")
    assert len(found.places) > 3


def test_what_a_sequence_cuts_is_counted(tmp_path: Path, letters: Tokenizer) -> None:
    run = config(corpus(tmp_path / "x", [list(b"abcdefghijklm")]), steps=None, batch=1, length=4)
    samples = open_data(run.with_({"model.vocab_size": 256}))
    (whole, cut) = seen_in_run(samples, samples.steps(1), ["bcd", "cdef"], letters)
    assert (len(whole.places), whole.cut) == (len(places_in_order(samples, samples.steps(1), "bcd")), 0)
    assert not cut.places and cut.cut <= 1


def test_published_rows(tmp_path: Path, letters: Tokenizer) -> None:
    rows = [b"abcd", b"xbcx", b"abab", b"bcbc"]
    corpus(tmp_path / "document", [list(row) for row in rows])
    (tmp_path / "document.bin").rename(tmp_path / "document-00000-of-00000.bin")
    source = open_published(tmp_path, 2)
    assert source is not None
    found, none = seen_in_rows(source, ["bc", "da"], letters)
    assert [(p.step, p.row, p.offset) for p in found.places] == [(1, 0, 1), (1, 1, 1), (2, 1, 0), (2, 1, 2)]
    assert not none.places  # "da" would go from one row to the next
