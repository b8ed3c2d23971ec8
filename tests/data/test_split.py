import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castalia.config.load import load_config
from castalia.config.schema import DataConfig
from castalia.data.config_corpora import open_data
from castalia.data.corpora import merge
from castalia.data.dataset_writer import DatasetWriter
from castalia.data.indexed import open_dataset
from castalia.data.prepare import Recipe, prepare
from castalia.data.sample_index import split_bounds
from castalia.data.split import (
    _assigned,
    by_hash,
    describe_held_out,
    document_hashes,
    one_sided,
    sources_of,
    split_documents,
    write_sources,
)
from castalia.errors import ConfigError

BYTES = Recipe(load_config([], ["tokenizer.kind=bytes"]).tokenizer)


def corpus(prefix, documents, dtype="uint16", files=None):
    with DatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(document)
    if files:
        write_sources(prefix, [len(document) for document in documents], files)
    return open_dataset(prefix)


def drawn(count, draw=None):
    draw = draw or np.random.default_rng(0)
    return [draw.integers(0, 1000, draw.integers(1, 90)).tolist() for _ in range(count)]


def test_the_original_s_split_takes_the_last_documents(tmp_path):
    text = corpus(tmp_path / "c", drawn(200))
    parts = split_documents(DataConfig(split="90, 6, 4", holdout="contiguous"), text)
    bounds = split_bounds("90, 6, 4", 200)
    assert [parts[name].tolist() for name in ("train", "valid", "test")] == [
        list(range(*bounds[n : n + 2])) for n in range(3)
    ]


@given(
    st.integers(1, 300), st.sampled_from(["90, 6, 4", "1, 1, 1", "97, 3, 0", "0, 1, 0", "1, 0, 0"]), st.integers(1, 9)
)
def test_by_hash_every_document_has_one_part_and_every_file_its_share(count, split, files):
    hashes = np.random.default_rng(count).integers(0, 2**63, count, dtype=np.uint64)
    numbers = np.sort(np.random.default_rng(files).integers(0, files, count))
    weights = [float(part) for part in split.split(",")]
    shares = weights[1] / sum(weights), weights[2] / sum(weights)
    part = by_hash(hashes, (list(map(str, range(files))), numbers), shares)
    for number, share in ((1, shares[0]), (2, shares[1])):
        assert abs((part == number).sum() - share * count) <= 1
        for file in range(files):
            mine = numbers == file
            assert abs((part[mine] == number).sum() - share * mine.sum()) <= 2


def test_equal_documents_are_on_one_side_and_the_order_of_the_corpus_does_not_matter(tmp_path):
    documents = drawn(60)
    text = corpus(tmp_path / "c", documents + documents[:30])
    data = DataConfig(split="1, 1, 0", holdout="hash")
    valid = set(split_documents(data, text)["valid"].tolist())
    assert all((number in valid) == (60 + number in valid) for number in range(30))
    order = np.random.default_rng(3).permutation(90).tolist()
    again = split_documents(data, corpus(tmp_path / "d", [(documents + documents)[:90][at] for at in order]))
    assert {order[number] for number in again["valid"].tolist()} == valid


def test_a_hash_sees_length_beginning_and_end_and_no_dtype(tmp_path):
    document = list(range(100))
    others = [document[:-1], [1, *document[1:]], [*document[:-1], 5], document[::-1], [], [0], [0, 0]]
    hashes = document_hashes(corpus(tmp_path / "c", [document, *others]))
    assert len(set(hashes.tolist())) == 8
    assert np.array_equal(hashes, document_hashes(corpus(tmp_path / "d", [document, *others], dtype="int32")))


def test_hashes_do_not_depend_on_the_blocks_that_they_are_made_in(tmp_path, monkeypatch):
    text = corpus(tmp_path / "c", drawn(50))
    whole = document_hashes(text)
    monkeypatch.setattr("castalia.data.split.BLOCK_DOCUMENTS", 7)
    assert np.array_equal(document_hashes(text), whole)


def test_training_and_validation_of_a_run_share_no_document(tmp_path):
    corpus(tmp_path / "c", drawn(80))
    model = ["model.num_layers=1", "model.hidden_size=8", "model.num_heads=1", "model.vocab_size=1000"]
    data = [f"data.path={tmp_path / 'c'}", "data.split=3,1,0", "data.holdout=hash", "data.seq_length=8"]
    config = load_config([], [*model, *data, "train.steps=4", "train.batch_size=2", "eval.batches=1"])
    seen = {split: set(open_data(config, split).corpora[0].index.documents.tolist()) for split in ("train", "valid")}
    assert len(seen["valid"]) == 20 and len(seen["train"]) == 60 and not seen["train"] & seen["valid"]


def test_prepared_corpora_know_their_files(tmp_path):
    for name, count in (("a/one.jsonl", 3), ("b/two.jsonl", 2)):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        (tmp_path / "in" / name).write_text('{"text": "words"}\n' * count)
    (tmp_path / "in" / "c.txt").write_text("more words")
    prepare([tmp_path / "in"], tmp_path / "out", BYTES)
    names, numbers = sources_of(open_dataset(tmp_path / "out_text_document"))
    assert (names, numbers.tolist()) == (["a/one.jsonl", "b/two.jsonl", "c.txt"], [0, 0, 0, 1, 1, 2])


def test_merged_corpora_know_their_parts_and_the_files_of_these(tmp_path):
    corpus(tmp_path / "a", drawn(3), files=[("x", 1), ("y", 2)])
    corpus(tmp_path / "b", drawn(2))
    names, numbers = sources_of(merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab"))
    assert (names, numbers.tolist()) == (["a/x", "a/y", "b"], [0, 1, 1, 2, 2])


@pytest.mark.parametrize("content", ["", "[]", '{"sizes": "other", "files": ["x"], "documents": [3]}', '{"files": 1}'])
def test_notes_of_other_documents_and_damaged_ones_are_not_believed(tmp_path, content):
    text = corpus(tmp_path / "a", drawn(3))
    (tmp_path / "a.sources.json").write_text(content)
    assert sources_of(text) is None


def test_a_one_sided_split_is_told_and_hashing_is_the_way_out(tmp_path):
    text = corpus(tmp_path / "a", drawn(100), files=[("code.py", 80), ("bible.txt", 20)])
    warning = one_sided(DataConfig(split="95, 5, 0", holdout="contiguous"), text)
    assert "its 5 documents are the last ones, all from bible.txt (1 of 2 files)" in warning
    assert "data.holdout=hash" in warning
    hashed = DataConfig(split="95, 5, 0", holdout="hash")
    assert one_sided(hashed, text) is None
    assert describe_held_out(hashed, text) == "5 of 100 documents, chosen by a hash of each, from 2 of 2 files"
    without_files = corpus(tmp_path / "b", drawn(20))
    assert one_sided(DataConfig(split="95, 5, 0", holdout="contiguous"), without_files) is None


def test_what_is_held_out_follows_the_program_that_a_config_is_for(tmp_path):
    (tmp_path / "neox.yml").write_text("{train_iters: 9, data_path: c, tokenizer_type: CharLevelTokenizer}")
    neox = load_config([tmp_path / "neox.yml"]).data
    assert (neox.holdout, neox.shuffled_passes) == ("contiguous", None)
    ours = load_config([], ["data.path=c", "train.steps=9"])
    assert (ours.data.holdout, ours.data.shuffled_passes) == ("hash", 16)
    exact = load_config([], ["neox_exact=true", "data.path=c", "train.steps=9"]).data
    assert (exact.holdout, exact.shuffled_passes) == ("contiguous", None)
    # Where each corpus is for one part as a whole, there is nothing to say.
    whole = load_config(
        [tmp_path / "neox.yml"], ["train_data_paths=[c]", "valid_data_paths=[c]", "test_data_paths=[c]"]
    )
    assert not [note for note in whole.notes if "holdout" in note]


def test_a_config_that_a_run_wrote_before_there_was_a_choice_is_contiguous(tmp_path):
    model = ["model.num_layers=1", "model.hidden_size=8", "model.num_heads=1"]
    stored = load_config([], [*model, "data.path=c", "train.steps=9"]).model_dump(mode="json")
    del stored["data"]["holdout"], stored["data"]["shuffled_passes"]
    (tmp_path / "config.yml").write_text(json.dumps(stored))
    data = load_config([tmp_path]).data
    assert (data.holdout, data.shuffled_passes) == ("contiguous", None)
    (tmp_path / "config.yml").write_text(json.dumps({"data": {"path": "c"}}))  # what a person writes
    assert load_config([tmp_path]).data.holdout == "hash"


def test_the_parts_of_many_documents_are_kept_in_a_file(tmp_path, monkeypatch):
    text = corpus(tmp_path / "c", drawn(60), files=[("a", 30), ("b", 30)])
    data = DataConfig(split="3, 1, 0", cache_dir=str(tmp_path / "cache"))
    expected = split_documents(data, text)["valid"].tolist()
    assert len(expected) == 15 and not (tmp_path / "cache").exists()
    monkeypatch.setattr("castalia.data.split.FILED_FROM", 60)
    _assigned.cache_clear()
    assert split_documents(data, text)["valid"].tolist() == expected
    assert len([*(tmp_path / "cache").glob("c_holdout_*_parts.npy")]) == 1
    monkeypatch.setattr("castalia.data.split.document_hashes", None)  # they are not made again
    _assigned.cache_clear()
    assert split_documents(data, text)["valid"].tolist() == expected


def test_a_corpus_that_has_changed_is_looked_at_again(tmp_path):
    data = DataConfig(split="1, 1, 0")
    before = split_documents(data, corpus(tmp_path / "c", drawn(40)))["valid"].tolist()
    other = corpus(tmp_path / "c", drawn(50, np.random.default_rng(1)))
    after = split_documents(data, other)["valid"].tolist()
    assert len(before) == 20 and len(after) == 25


def test_a_run_that_repeats_the_original_takes_its_split():
    with pytest.raises(ConfigError, match="takes validation as the original does, data.holdout=hash does not"):
        load_config([], ["neox_exact=true", "data.holdout=hash", "data.path=c", "train.steps=1"])
