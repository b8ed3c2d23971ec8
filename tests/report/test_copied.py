import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from castalia.data.dataset_writer import DatasetWriter
from castalia.data.indexed import open_dataset
from castalia.report import copied
from castalia.report.copied import CommonRun, longest_runs

SMALL = st.lists(st.integers(0, 2), max_size=14)


def corpus(folder, documents, name="corpus"):
    with DatasetWriter(folder / name, "uint16") as writer:
        for document in documents:
            writer.add(document)
    return open_dataset(folder / name)


def longest_by_hand(sample, documents):
    return max(
        (
            end - start
            for start in range(len(sample))
            for end in range(start + 1, len(sample) + 1)
            for document in documents
            for at in range(len(document))
            if document[at : at + end - start] == sample[start:end]
        ),
        default=0,
    )


@given(st.lists(SMALL, min_size=1, max_size=3), st.lists(SMALL.filter(bool), min_size=1, max_size=4), st.integers(1, 4))
def test_the_longest_run_is_found_wherever_it_is(tmp_path_factory, samples, documents, shortest):
    text = corpus(tmp_path_factory.mktemp("text"), documents)
    found, searched = longest_runs([np.array(sample, np.int64) for sample in samples], [text], shortest, 1000)
    assert searched.tokens == searched.of_tokens == sum(map(len, documents))
    for sample, run in zip(samples, found, strict=True):
        expected = longest_by_hand(sample, documents)
        assert (run.length if run else 0) == (expected if expected >= shortest else 0)
        if run:
            assert sample[run.start : run.stop] == documents[run.document][run.at : run.at + run.length]


def test_a_planted_passage_is_found_over_the_borders_of_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(copied, "BLOCK_TOKENS", 16)
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 1000, 50).tolist() for _ in range(8)]
    sample = np.array([1001, *documents[5][9:41], 1002])
    (found,), _ = longest_runs([sample], [corpus(tmp_path, documents)], 6, 1000)
    assert found == CommonRun(1, 33, corpus=0, document=5, at=9)


def test_what_is_no_training_text_does_not_count(tmp_path):
    text = corpus(tmp_path, [[1, 2, 3, 4, 5], [1, 2, 3, 9]])
    (found,), _ = longest_runs([np.array([1, 2, 3, 4, 5])], [text], 2, 1000, lambda _: np.array([True, False]))
    assert (found.document, found.length) == (1, 3)


def test_of_a_large_corpus_a_share_is_searched_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(copied, "BLOCK_TOKENS", 10)
    text = corpus(tmp_path, [list(range(100))])
    _, searched = longest_runs([np.arange(5)], [text], 3, most_tokens=40)
    assert (searched.tokens, searched.of_tokens) == (40, 100)
