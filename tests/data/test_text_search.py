import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castalia.data.text_search import find_runs, find_texts, wanted
from castalia.data.tokenizer import Tokenizer, train_bpe

TEXT = "the light of the morning was the light of the evening; and the waters were in the light "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT * 20], 320)


@given(
    tokens=st.lists(st.integers(0, 3), max_size=60),
    needles=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=20),
)
def test_runs_are_those_that_a_comparison_at_each_place_finds(tokens: list[int], needles: list[list[int]]) -> None:
    found = find_runs(np.array(tokens, "<u2"), needles)
    for starts, needle in zip(found, needles, strict=True):
        expected = [at for at in range(len(tokens)) if tokens[at : at + len(needle)] == needle]
        assert sorted(starts.tolist()) == expected


@given(
    kind=st.sampled_from(["u1", "i1", "<u2", "<i4", "<i8"]),
    tokens=st.lists(st.integers(0, 2), min_size=8, max_size=80),
    skipped=st.integers(0, 5),
    needles=st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=12), min_size=3, max_size=20),
    cuts=st.lists(st.tuples(st.integers(0, 70), st.integers(7, 20)), min_size=20, max_size=30),
)
def test_many_long_runs_are_found_by_their_windows(kind, tokens, skipped, needles, cuts) -> None:
    array = np.array([9] * skipped + tokens, kind)[skipped:]  # at any address
    sought = needles + [tokens[at : at + size] or [0] for at, size in cuts] + [[70000] * 7, [-1] * 9]
    for starts, needle in zip(find_runs(array, sought), sought, strict=True):
        assert starts.tolist() == [at for at in range(len(tokens)) if tokens[at : at + len(needle)] == needle]


@pytest.mark.parametrize(
    "text", ["light of the morning", "ight of the eveni", "the waters were in", " the light of the evening; and"]
)
def test_a_text_is_found_whatever_stands_beside_it(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(TEXT)
    asked = wanted(text, tokenizer)
    (place,) = find_texts(np.array(ids), [asked], tokenizer, np.array([0, len(ids)]))
    assert asked.core and text in tokenizer.decode(ids[place.start : place.stop])
    for fewer in (ids[place.start + 1 : place.stop], ids[place.start : place.stop - 1]):
        assert text not in tokenizer.decode(fewer)


def test_each_of_several_places_is_found_once(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    found = list(find_texts(np.array(ids), [wanted("light of the", tokenizer)], tokenizer, np.array([0, len(ids)])))
    assert len(found) == len(set(found)) == TEXT.count("light of the") == 2


def test_no_place_crosses_the_border_of_two_items(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    ((_, start, stop),) = find_texts(
        np.array(ids), [wanted("were in the", tokenizer)], tokenizer, np.array([0, len(ids)])
    )
    border = (start + stop) // 2
    limits = np.array([0, border, len(ids)])
    assert not list(find_texts(np.array(ids), [wanted("were in the", tokenizer)], tokenizer, limits))


def test_a_text_without_a_core_is_found_by_its_ids(tokenizer: Tokenizer) -> None:
    asked = wanted("light", tokenizer)
    ids = tokenizer.encode(TEXT)
    found = list(find_texts(np.array(ids), [asked], tokenizer, np.array([0, len(ids)])))
    assert not asked.core and len(found) == TEXT.count(" light")
