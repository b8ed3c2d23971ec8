import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castalia.config.schema import TokenizerConfig
from castalia.data.indexed import open_dataset
from castalia.data.prepare import Recipe, mask_labels, prepare
from castalia.data.tokenizer import load_tokenizer, train_bpe
from castalia.errors import DataError

CHAR = TokenizerConfig(kind="char")
BYTES = TokenizerConfig(kind="bytes")


def jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def contents(prefix: Path) -> bytes:
    return Path(f"{prefix}.bin").read_bytes() + Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize(
    ("text", "tokenizer", "expected"),
    [
        ("data/corpora/genesis.jsonl", "tokenizer/20B_tokenizer.json", "data/corpora/genesis_text_document"),
        ("data/corpora/proverbs.jsonl", "tokenizer/20B_tokenizer.json", "data/corpora/proverbs_text_document"),
        ("neox/data/enwik8.jsonl", "neox/data/tok.json", "neox/data/enwik8_text_document"),
    ],
)
def test_files_are_the_originals(fixtures: Path, tmp_path: Path, text: str, tokenizer: str, expected: str) -> None:
    recipe = Recipe(TokenizerConfig(path=str(fixtures / tokenizer)), append_eod=True)
    prepare([fixtures / text], tmp_path / "new" / "corpus", recipe)
    assert contents(tmp_path / "new" / "corpus_text_document") == contents(fixtures / expected)


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    words = [" ".join(map(str, random.randint(0, 999, random.randint(0, 60)))) for _ in range(9000)]
    source = jsonl(tmp_path / "a.jsonl", *({"text": text} for text in words))
    for workers in (1, 2, 3):
        report = prepare([source], tmp_path / str(workers), Recipe(CHAR, append_eod=True), workers=workers)
        assert report.done_bytes == report.total_bytes == source.stat().st_size
    assert (
        contents(tmp_path / "1_text_document")
        == contents(tmp_path / "2_text_document")
        == contents(tmp_path / "3_text_document")
    )
    corpus = open_dataset(tmp_path / "3_text_document")
    assert [bytes(item[:-1].tolist()).decode() for item in corpus] == [text for text in words if text]
    assert report.empty == words.count("") and report.tokens == len(corpus.tokens)


def test_an_error_in_a_worker_leaves_nothing(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", *["some words to fill a line with"] * 60_000)
    with source.open("a") as file:
        file.write("{broken\n")
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"a\.jsonl:60001: not JSON"):
        prepare([source], out / "x", Recipe(CHAR), workers=2)
    assert not list(out.iterdir())
    report = prepare([source], out / "x", Recipe(CHAR, skip_bad=True), workers=2)
    assert report.documents == 60_000 and len(report.bad) == 1


def test_an_end_that_the_tokenizer_writes_is_not_doubled(tmp_path: Path) -> None:
    train_bpe(["a"], 270).save(tmp_path)
    settings = {"eos_token": "<|endoftext|>", "add_eos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = TokenizerConfig(path=str(tmp_path))
    source = jsonl(tmp_path / "x.jsonl", {"text": "a b"}, {"text": "c"})
    (prefix,) = prepare([source], tmp_path / "x", Recipe(tokenizer, append_eod=True)).outputs
    assert [list(document) for document in open_dataset(prefix)] == load_tokenizer(tokenizer).encode_batch(["a b", "c"])
    assert open_dataset(prefix)[1][-1] == 0


def test_several_keys_give_a_corpus_each(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"title": "T", "body": "one"}, {"title": "", "body": "two"})
    report = prepare([source], tmp_path / "x", Recipe(BYTES, keys=("title", "body")))
    assert report.outputs == [f"{tmp_path}/x_title_document", f"{tmp_path}/x_body_document"] and report.empty == 1
    assert [bytes(item.tolist()) for item in open_dataset(tmp_path / "x_body_document")] == [b"one", b"two"]
    assert len(open_dataset(tmp_path / "x_title_document")) == 1


def test_stop_after_some_documents(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", *map(str, range(10)))
    report = prepare([source], tmp_path / "x", Recipe(BYTES), num_docs=3)
    assert report.documents == len(open_dataset(tmp_path / "x_text_document")) == 3


def test_masked_labels(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", "question: answer", "no separator", "a: b: c")
    prepare([source], tmp_path / "x", Recipe(BYTES, append_eod=True, mask_before=(58, 32)))
    text, labels = open_dataset(tmp_path / "x_text_document"), open_dataset(tmp_path / "x_label_document")
    assert text.dtype == labels.dtype == np.int32 and np.array_equal(text.sizes, labels.sizes)
    expected = [[-100] * 10 + [*b"answer", 256], [*b"no separator", 256], [-100] * 3 + [*b"b: c", 256]]
    assert [item.tolist() for item in labels] == expected


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), min_size=1, max_size=3))
def test_masked_labels_equal_a_search(tokens: list[int], before: list[int]) -> None:
    found = next((i for i in range(len(tokens)) if tokens[i : i + len(before)] == before), None)
    masked = 0 if found is None else found + len(before)
    assert mask_labels(np.array(tokens, np.uint16), before).tolist() == [-100] * masked + tokens[masked:]


def test_ftfy(tmp_path: Path) -> None:
    pytest.importorskip("ftfy", reason="needs ftfy")
    prepare([jsonl(tmp_path / "a.jsonl", "schÃ¶n")], tmp_path / "x", Recipe(BYTES, ftfy=True))
    assert bytes(open_dataset(tmp_path / "x_text_document")[0].tolist()).decode() == "schön"


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(DataError, match="pip install ftfy"):
        prepare([jsonl(tmp_path / "a.jsonl", "a")], tmp_path / "x", Recipe(BYTES, ftfy=True))


@pytest.mark.parametrize(
    ("records", "recipe", "message"),
    [
        ([], Recipe(BYTES), "no documents in"),
        (["", ""], Recipe(BYTES), "2 empty"),
        (["a"], Recipe(BYTES, keys=("a", "b"), mask_before=(1,)), "works on one key"),
        (["a"], Recipe(TokenizerConfig()), "no tokenizer"),
    ],
)
def test_what_cannot_be_prepared(tmp_path: Path, records: list, recipe: Recipe, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare([jsonl(tmp_path / "a.jsonl", *records)], tmp_path / "x", recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", "a")
    with pytest.raises(DataError, match="cannot prepare"):
        prepare([source], source / "x", Recipe(BYTES))
