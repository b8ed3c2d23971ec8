import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castalia.data.indexed import open_dataset
from castalia.data.sample_index import Index, build_overflowing, build_packed, locate, pieces, split_bounds
from castalia.errors import DataError

PARTS = ("doc_idx", "sample_idx", "shuffle_idx")


def manifest(fixtures: Path) -> dict:
    return json.loads((fixtures / "data" / "manifest.json").read_text())


def assert_equals_files(index: Index, stem: Path) -> None:
    for part, array in zip(PARTS, (index.documents, index.bounds, index.order), strict=True):
        expected = np.load(f"{stem}_{part}.npy")
        assert array.dtype == expected.dtype and np.array_equal(array, expected), part


def test_split_bounds(fixtures: Path) -> None:
    for known in json.loads((fixtures / "data" / "vectors.json").read_text())["splits"]:
        assert split_bounds(known["split"], known["size"]) == known["index"]


@pytest.mark.parametrize("split", ["", "a,b", "0,0,0", "1,-1", "nan"])
def test_split_that_is_none(split: str) -> None:
    with pytest.raises(DataError, match="data.split"):
        split_bounds(split, 10)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("split", [0, 1, 2])
def test_packed_index_is_the_originals(fixtures: Path, corpora: Path, number: int, split: int) -> None:
    known = manifest(fixtures)["sets"][number]
    name, bounds = ("train", "valid", "test")[split], known["splits"]
    sizes = open_dataset(corpora / known["corpus"]).sizes
    documents = np.arange(bounds[split], bounds[split + 1])
    if known["datasets"][name] is None:
        assert not len(documents)
        return
    wanted = known["ns"][split] if "ns" in known else None
    index = build_packed(sizes, documents, wanted, known["seq"], known["seed"])
    assert len(index) == known["datasets"][name]["length"]
    stem = f"{known['corpus']}_{name}_indexmap_{wanted}ns_{known['seq']}sl_{known['seed']}s_packedpi_ac"
    assert_equals_files(index, fixtures / "data" / "index" / stem)


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    wanted=st.none() | st.integers(0, 40),
    length=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_packed_samples_cut_the_shuffled_documents(
    sizes: list[int], wanted: int | None, length: int, seed: int
) -> None:
    total = sum(sizes)
    if total < 2:
        with pytest.raises(DataError, match="nothing to train on"):
            build_packed(np.array(sizes), np.arange(len(sizes)), wanted, length, seed)
        return
    index = build_packed(np.array(sizes), np.arange(len(sizes)), wanted, length, seed)
    text = [(document, at) for document in index.documents.tolist() for at in range(sizes[document])]
    epochs = len(index.documents) // len(sizes)
    assert epochs == 1 or ((epochs - 1) * total - 1) // length < (wanted or 0)
    assert len(index.order) == (epochs * total - 1) // length >= (wanted or 0)
    for sample in range(len(index.order)):
        tokens = [(d, at) for d, start, stop in pieces(index, np.array(sizes), sample) for at in range(start, stop)]
        assert tokens == text[sample * length : (sample + 1) * length + 1]


def naive_overflowing(sizes, documents, usable, wanted, length, seed):
    """One document after the other."""
    rng = np.random.RandomState(seed)
    rng.shuffle(np.arange(wanted))
    turns, at = np.arange(len(documents)), len(documents)
    taken, starts, filled = [], [], 0
    while len(starts) < wanted:
        if at == len(turns):
            rng.shuffle(turns)
            at = 0
        turn, at = turns[at], at + 1
        if not usable[turn]:
            continue
        if not starts or filled + sizes[documents[turn]] > length + 1:
            starts.append(len(taken))
            filled = 0
        taken.append(documents[turn])
        filled += sizes[documents[turn]]
    return taken, [*starts, len(taken)]


@given(
    st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 30),
    st.integers(1, 40),
    st.integers(0, 99),
)
def test_overflowing_equals_one_document_after_the_other(items, wanted: int, length: int, seed: int) -> None:
    sizes, usable = np.array([size for size, _ in items]), np.array([use for _, use in items])
    documents = np.arange(len(items))
    if not usable.any():
        with pytest.raises(DataError, match="no document can be trained on"):
            build_overflowing(sizes, documents, usable, wanted, length, seed)
        return
    index = build_overflowing(sizes, documents, usable, wanted, length, seed)
    taken, borders = naive_overflowing(sizes, documents, usable, wanted, length, seed)
    assert index.documents.tolist() == taken and index.bounds[:, 0].tolist() == borders


@pytest.mark.parametrize(
    ("order", "samples"), [([0, 3, 2, 1], [0, 0, 2, 1, 0, 2, 0]), ([3, 0, 2, 1], [0, 0, 2, 1, 0, 2, 0])]
)
def test_what_runs_off_the_end_is_taken_modulo_the_length(order: list[int], samples: list[int]) -> None:
    index = Index(np.arange(4), np.stack([np.arange(5), np.zeros(5, int)], axis=1), np.array(order))
    assert [locate(index, position) for position in range(7)] == samples  # sample 3 ends behind the last document


def test_too_little_data_for_one_sample() -> None:
    index = build_packed(np.array([5]), np.arange(1), None, 20, 1)
    with pytest.raises(DataError, match="one whole sample"):
        locate(index, 0)
