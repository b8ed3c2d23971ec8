from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castalia.config.schema import DataConfig
from castalia.data.corpora import describe, duplicates, merge, split
from castalia.data.dataset_writer import DatasetWriter
from castalia.data.indexed import IndexedDataset, open_dataset
from castalia.data.sample_index import split_bounds
from castalia.data.split import PARTS, file_of_each, split_documents, write_sources
from castalia.errors import DataError

Documents = list[list[list[int]]]  # documents of items of ids
documents = st.lists(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=3), max_size=8)


def write(prefix: Path, content: Documents, dtype: str = "u2") -> Path:
    with DatasetWriter(prefix, dtype) as writer:
        for document in content:
            for i, item in enumerate(document):
                writer.add(item, end_document=i == len(document) - 1)
    return prefix


def read(data: IndexedDataset) -> Documents:
    return [[item.tolist() for item in data[a:b]] for a, b in zip(data.doc_index, data.doc_index[1:], strict=False)]


@given(documents, documents)
def test_merge_keeps_documents(tmp_path_factory: pytest.TempPathFactory, first: Documents, second: Documents) -> None:
    folder = tmp_path_factory.mktemp("merge")
    merged = merge([write(folder / "a", first), write(folder / "b", second, "i4")], folder / "out")
    assert read(merged) == first + second and merged.dtype == np.int32


@given(documents, st.sampled_from(["969,30,1", "1,1,1", "0,1,0", "5,5"]))
def test_split_writes_the_shares(tmp_path_factory: pytest.TempPathFactory, content: Documents, weights: str) -> None:
    folder = tmp_path_factory.mktemp("split")
    bounds = split_bounds(weights, len(content))
    expected = [content[a:b] for a, b in zip(bounds, bounds[1:], strict=False) if a < b]
    written = split(write(folder / "a", content), weights, folder / "out", by="order")
    assert [read(part) for part in written] == expected


@given(documents, st.sampled_from(["969,30,1", "1,1,1", "0,1,0", "5,5"]))
def test_a_split_by_hash_loses_no_document(
    tmp_path_factory: pytest.TempPathFactory, content: Documents, weights: str
) -> None:
    folder = tmp_path_factory.mktemp("hash")
    parts = [read(part) for part in split(write(folder / "a", content), weights, folder / "out")]
    assert sorted(document for part in parts for document in part) == sorted(content)
    for here, there in combinations(parts, 2):  # equal documents are on one side
        assert not [document for document in here if document in there]


def test_by_hash_the_parts_are_those_of_a_run_and_know_their_files(tmp_path: Path) -> None:
    content = [[[number, *range(number % 5)]] for number in range(200)]
    data = open_dataset(write(tmp_path / "a", content))
    write_sources(data.prefix, data.sizes, [("x", 120), ("y", 80)])
    parts = split(data.prefix, "8,1,1", tmp_path / "out")
    expected = split_documents(DataConfig(path=data.prefix, split="8,1,1"), data)
    for name, part in zip(PARTS, parts, strict=True):
        assert read(part) == [content[number] for number in expected[name]]
        assert file_of_each(part) == ["x" if number < 120 else "y" for number in expected[name]]
    assert set(file_of_each(parts[1])) == {"x", "y"}


def test_counts(tmp_path: Path) -> None:
    data = open_dataset(write(tmp_path / "a", [[[1, 2, 3], [4]], [[4]], [[7] * 8]]))
    facts = describe(data)
    assert (facts["documents"], facts["items"], facts["tokens"], facts["largest_id"]) == (3, 4, 13, 7)
    assert facts["lengths"] == [
        {"from": 1, "to": 1, "items": 2},
        {"from": 2, "to": 3, "items": 1},
        {"from": 8, "to": 15, "items": 1},
    ]
    assert duplicates(data) == 1
    assert describe(open_dataset(write(tmp_path / "none", [])))["largest_id"] is None


def test_an_input_is_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1]]])
    with pytest.raises(DataError, match="is an input as well"):
        merge([tmp_path / "a"], tmp_path / "a")
