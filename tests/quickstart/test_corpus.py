"""What is held out: about its share, never on both sides, and a part of every long document."""

import numpy as np
import pytest

from castalia.data.dataset_writer import DatasetWriter
from castalia.data.indexed import open_dataset
from castalia.data.split import sources_of
from castalia.errors import DataError
from castalia.quickstart.corpus import STRETCH_TOKENS, hold_out


def write(prefix, documents):
    with DatasetWriter(prefix, "<u2") as writer:
        for document in documents:
            writer.add(document)
    return str(prefix)


def held(tmp_path, prefixes, share, name=""):
    train, valid = tmp_path / f"train{name}", tmp_path / f"valid{name}"
    return hold_out(prefixes, str(train), str(valid), share), open_dataset(train), open_dataset(valid)


def test_documents_are_divided_by_their_content_whatever_the_order(tmp_path):
    random = np.random.default_rng(0)
    documents = [random.integers(0, 999, random.integers(5, 60)).astype("<u2") for _ in range(2000)]
    (kept, out), train, valid = held(tmp_path, [write(tmp_path / "a", documents)], 0.1)
    assert kept + out == sum(map(len, documents))
    assert 0.06 < out / (kept + out) < 0.14
    sides = [{document.tobytes() for document in side} for side in (train, valid)]
    assert not sides[0] & sides[1]
    halves = [write(tmp_path / "b", documents[:500:-1]), write(tmp_path / "c", documents[500::-1])]
    _, _, again = held(tmp_path, halves, 0.1, "2")
    assert {document.tobytes() for document in again} == sides[1]


def test_the_same_text_is_never_on_both_sides(tmp_path):
    documents = [np.full(20, number % 50, "<u2") for number in range(500)]
    _, train, valid = held(tmp_path, [write(tmp_path / "a", documents)], 0.3)
    assert not {document.tobytes() for document in train} & {document.tobytes() for document in valid}
    assert len(train) + len(valid) == 500


def test_one_long_book_has_something_to_hold_out_and_keeps_its_order(tmp_path):
    book = np.arange(60 * STRETCH_TOKENS + 7).astype("<u2")
    (kept, out), train, valid = held(tmp_path, [write(tmp_path / "a", [book])], 0.1)
    assert kept + out == len(book)
    assert out >= 2 * STRETCH_TOKENS
    for piece in (*train, *valid):
        steps = np.diff(piece.astype("<u2")).astype(np.uint16)
        assert (steps == 1).all()


def test_what_is_held_out_knows_its_files(tmp_path):
    random = np.random.default_rng(0)
    parts = [write(tmp_path / name, [random.integers(0, 999, 20) for _ in range(50)]) for name in "ab"]
    _, train, valid = held(tmp_path, parts, 0.3)
    for side in (train, valid):
        names, numbers = sources_of(side)
        assert names == ["a", "b"] and len(numbers) == len(side)
    assert sum((sources_of(side)[1] == 0).sum() for side in (train, valid)) == 50


def test_few_tokens_are_refused(tmp_path):
    with pytest.raises(DataError, match="too few to learn from"):
        hold_out([write(tmp_path / "a", [[1, 2, 3], [4, 5]])], str(tmp_path / "t"), str(tmp_path / "v"), 0.1)
