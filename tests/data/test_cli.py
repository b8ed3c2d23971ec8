import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from castalia.cli import data as data_verbs
from castalia.cli import tokenizer as tokenizer_verbs
from castalia.data.dataset_writer import DatasetWriter
from castalia.data.indexed import open_dataset
from castalia.data.sources import documents
from castalia.errors import DataError


def run(app, *words: object) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a corpus, its tokenizer and a config, made with the commands of the documentation."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": f"{i} green bottles hanging on the wall"}) + "\n" for i in range(200)]
    Path("corpus.jsonl").write_text("".join(lines))
    Path("corpus.txt").write_text("".join(lines))
    made = run(tokenizer_verbs.app, "train", "corpus.txt", "--vocab-size", 270, "--output", "tokenizer.json")
    assert "tokenizer.json: 270 entries" in made.output
    options = ("--tokenizer", "tokenizer.json", "--output", "data/corpus", "--append-eod")
    done = run(data_verbs.app, "prepare", "corpus.jsonl", *options)
    assert "data/corpus_text_document: 200 documents" in done.output
    assert done.output.splitlines()[-1] == "each document ends with id 0 (<|endoftext|>)"
    Path("config.yml").write_text(
        "model: {num_layers: 1, hidden_size: 8, num_heads: 1}\n"
        "data: {path: data/corpus_text_document, seq_length: 16}\n"
        "tokenizer: {path: tokenizer.json}\n"
        "train: {steps: 20, batch_size: 3}\n"
    )
    return tmp_path


def test_a_preparation_tells_a_program_what_it_made(prepared: Path) -> None:
    done = run(data_verbs.app, "prepare", "corpus.jsonl", "--tokenizer-kind", "bytes", "--output", "again", "--json")
    found = json.loads(done.output)
    assert found["documents"] == 200 and found["outputs"] == ["again_text_document"]


def test_inspect(prepared: Path) -> None:
    corpus = open_dataset("data/corpus_text_document")
    text = run(data_verbs.app, "inspect", "data/corpus_text_document", "--tokenizer", "tokenizer.json").output
    assert "0 green bottles hanging on the wall" in text and f"{len(corpus.tokens):,}" in text
    facts = json.loads(run(data_verbs.app, "inspect", "data/corpus_text_document", "--json").output)
    assert (facts["documents"], facts["tokens"], facts["dtype"]) == (200, len(corpus.tokens), "uint16")
    assert facts["largest_id"] == corpus.tokens.max() and sum(row["items"] for row in facts["lengths"]) == 200
    assert all(row["from"] <= facts["longest"] and row["to"] >= facts["shortest"] for row in facts["lengths"])


def test_long_texts_of_a_batch_are_wrapped(prepared: Path) -> None:
    shown = run(data_verbs.app, "batch", "config.yml", "data.seq_length=150", "train.batch_size=1").output
    assert max(map(len, shown.splitlines())) in range(80, 101)


def test_batch_shows_documents_and_tokens(prepared: Path) -> None:
    shown = json.loads(run(data_verbs.app, "batch", "config.yml", "--step", 8, "--json", "--npy", "ids.npy").output)
    ids, corpus = np.load("ids.npy"), open_dataset("data/corpus_text_document")
    assert ids.shape == (3, 17) and len(shown["samples"]) == 3
    for row, sample in zip(ids, shown["samples"], strict=True):
        pieces = [corpus[p["document"]][p["start"] : p["stop"]] for p in sample["pieces"]]
        assert np.array_equal(np.concatenate(pieces), row)
        assert sample["tokens"] == row[:-1].tolist() and sample["labels"] == row[1:].tolist()
    text = run(data_verbs.app, "batch", "config.yml", "--step", 8, "data.seq_length=8").output
    assert "step 8, sequence 2" in text and "8 of 8 labels count" in text and "green" in text


def test_batch_shows_both_sides_of_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ask, *answers = ({"role": role, "content": text} for role, text in (("u", "2"), ("a", "4"), ("a", "5")))
    record = {"chosen": [ask, answers[0]], "rejected": [ask, answers[1]]}
    Path("pairs.jsonl").write_text(json.dumps(record) + "\n")
    Path("chat.jinja").write_text("{% for m in messages %}{{ m.role }}{{ m.content }};{% endfor %}")
    words = ("--output", "x", "--tokenizer-kind", "bytes", "--chat-template", "chat.jinja", "--generation-role", "a")
    run(data_verbs.app, "prepare", "pairs.jsonl", *words, "--jsonl-keys", "chosen,rejected")
    sides = [{"path": f"x_{side}_document", "labels": f"x_{side}_label_document"} for side in ("chosen", "rejected")]
    source = json.dumps([{**sides[0], "rejected": sides[1]}])
    config = (f"data.train={source}", "data.packing=unpacked", "data.seq_length=8", "tokenizer.kind=bytes")
    config = (*config, "train.objective=dpo", "train.steps=2", "train.batch_size=1")
    shown = json.loads(run(data_verbs.app, "batch", *config, "--json", "--npy", "ids.npy").output)["samples"]
    assert [sample["side"] for sample in shown] == ["chosen", "rejected"]
    assert [sample["text"][:6] for sample in shown] == ["u2;a4;", "u2;a5;"]
    assert np.load("ids.npy")[:, 4].tolist() == [ord("4"), ord("5")]
    text = run(data_verbs.app, "batch", *config).output
    assert "data order, chosen" in text and "data order, rejected" in text and "4 of 8 labels count" in text


def test_rows_of_several_steps_as_a_file(prepared: Path) -> None:
    done = run(data_verbs.app, "batch", "config.yml", "--steps", "2..3,19..", "--output", "rows.jsonl")
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert "wrote rows.jsonl: 12 rows" in done.output
    assert [(row["step"], row["row"]) for row in rows] == [(s, r) for s in (2, 3, 19, 20) for r in range(3)]
    shown = json.loads(run(data_verbs.app, "batch", "config.yml", "--step", 3, "--json").output)["samples"][1]
    assert rows[4]["ids"] == [*shown["tokens"], shown["labels"][-1]] and rows[4]["documents"] == shown["pieces"]
    assert rows[4]["text"] == shown["text"] and rows[4]["epoch"] == 1 and rows[4]["loss_tokens"] == 16


def test_where_a_text_is_seen(prepared: Path) -> None:
    words = ("seen", "17 green b", "config.yml", "train.steps=400")
    (found,) = json.loads(run(data_verbs.app, *words, "--json").output)
    assert found["times"] == len(found["places"]) > 1 and found["places"][0]["first"] and found["anywhere"]
    for place in found["places"]:
        words_of_step = ("batch", "config.yml", "train.steps=400", "--step", place["step"], "--json")
        row = json.loads(run(data_verbs.app, *words_of_step).output)["samples"][place["row"]]
        assert "17 green b" in row["text"] and place["document"] % 100 == 17
    shown = run(data_verbs.app, *words).output
    assert f"seen {found['times']} times, first in step {found['places'][0]['step']}" in shown and "again" in shown
    Path("texts.jsonl").write_text('{"text": "green bottles"}\n{"text": "blue bottles stand"}\n')
    several = json.loads(run(data_verbs.app, "seen", "--file", "texts.jsonl", "config.yml", "--json").output)
    assert several[0]["times"] > 20 and several[1]["times"] == 0


def test_published_rows_in_shards(prepared: Path) -> None:
    run(data_verbs.app, "batch", "config.yml", "--steps", "1..4", "--output", "rows.jsonl")
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    with DatasetWriter("suite/document", "u2") as writer:
        for row in rows:
            writer.add(row["ids"])
    raw = Path("suite/document.bin").read_bytes()
    for number in range(3):
        Path(f"suite/document-0000{number}-of-00002.bin").write_bytes(raw[number * 160 : (number + 1) * 160])
    Path("suite/document-00002-of-00002.bin").write_bytes(raw[320:])
    Path("suite/document.bin").unlink()
    options = ("--tokenizer", "tokenizer.json", "--batch-size", 3)
    run(data_verbs.app, "batch", "suite", "--steps", "2..3", *options, "--output", "again.jsonl")
    again = [json.loads(line) for line in Path("again.jsonl").read_text().splitlines()]
    assert [(row["step"], row["row"], row["ids"], row["text"][:9]) for row in again] == [
        (row["step"], row["row"], row["ids"], row["text"][:9]) for row in rows[3:9]
    ]
    (found,) = json.loads(run(data_verbs.app, "seen", "een bottles h", "suite", *options, "--json").output)
    first = found["places"][0]  # a row holds one token more than is shown of it
    wanted = ",".join(map(str, rows[first["position"]]["ids"][first["offset"] :][: first["tokens"]]))
    holding = [number for number, row in enumerate(rows) if f",{wanted}," in ",".join(["", *map(str, row["ids"]), ""])]
    assert len(holding) > 1 and [place["position"] for place in found["places"]] == holding
    assert "--- step 2, sequence 1: row 4" in run(data_verbs.app, "batch", "suite", "--step", 2, *options).output


def test_stats_merge_and_split(prepared: Path) -> None:
    corpus = Path("data/corpus_text_document")
    assert "400 documents" in run(data_verbs.app, "merge", corpus, corpus, "--output", "twice").output
    (facts,) = json.loads(run(data_verbs.app, "stats", "twice", "--json", "--plot", "lengths.png").output)
    assert facts["duplicates"] == 200 and Path("lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "200 duplicates" in run(data_verbs.app, "stats", "twice", corpus).output
    shown = run(data_verbs.app, "split", corpus, "--weights", "8,1,1", "--output", "part").output
    assert "part_train: 160 documents" in shown and "part_test: 20 documents" in shown


def test_programs_are_told_what_was_written(prepared: Path) -> None:
    corpus = Path("data/corpus_text_document")
    (whole,) = json.loads(run(data_verbs.app, "merge", corpus, corpus, "--output", "twice", "--json").output)
    assert whole == {"prefix": "twice", "documents": 400, "tokens": 2 * len(open_dataset(corpus).tokens)}
    parts = json.loads(run(data_verbs.app, "split", corpus, "--output", "part", "--weights", "8,1,1", "--json").output)
    assert [(part["prefix"], part["documents"]) for part in parts][::2] == [("part_train", 160), ("part_test", 20)]
    words = ("train", "corpus.txt", "--vocab-size", 270, "--output", "again.json", "--json")
    assert json.loads(run(tokenizer_verbs.app, *words).output) == {"output": "again.json", "entries": 270}


def test_mistakes(prepared: Path) -> None:
    for words, message in [
        (("batch", "config.yml", "--step", "9999"), "--step 9999: the run's steps are 1 to "),
        (("batch", "config.yml", "--steps", "19..21"), "--steps 21: the run's steps are 1 to 20"),
        (("batch", "config.yml", "--steps", "0..3"), "steps are counted from 1"),
        (("batch", "config.yml", "--step", "1", "--steps", "3"), "not both"),
        (("seen", "config.yml"), "give the text and a run or a config"),
        (("seen", "", "config.yml"), "the text is empty"),
        (("batch", "config.yml", "--split", "training"), "--split training is none of train, valid, test"),
        (("prepare", "corpus.jsonl", "--output", "x", "--tokenizer-kind", "magic"), "--tokenizer-kind magic"),
        (("prepare", "corpus.jsonl", "--output", "x", "--tokenizer-kind", "char", "--mask-before-token", "a"), "ids"),
        (("prepare", "corpus.jsonl", "--output", "x"), "no tokenizer: give --tokenizer FILE"),
        (("inspect", "data/nothing"), "does not exist"),
    ]:
        with pytest.raises(DataError, match=message):
            run(data_verbs.app, *words)


def test_fields_of_other_names_are_read_and_told_how(prepared: Path) -> None:
    Path("mixed.jsonl").write_text('{"text": "one", "body": "not this"}\n{"body": "two"}\n')
    words = ("prepare", "mixed.jsonl", "--output", "mixed", "--tokenizer-kind", "bytes")
    with pytest.raises(
        DataError, match="has 'body'; mend it or take it out, name its field with --jsonl-keys .'text.body'"
    ):
        run(data_verbs.app, *words)
    with pytest.raises(DataError, match=r"take whichever field a record has: --jsonl-keys 'text\|body', or leave"):
        run(data_verbs.app, *words, "--jsonl-keys", "text,body")
    with pytest.raises(DataError, match="mend it or take it out, or name its field with --jsonl-keys"):
        run(tokenizer_verbs.app, "train", "mixed.jsonl", "--output", "mixed.json")
    run(data_verbs.app, *words, "--jsonl-keys", "text|body")
    assert [bytes(ids.astype("u1")) for ids in open_dataset("mixed_text_document")] == [b"one", b"two"]


def test_documents_without_ends_are_told_of(prepared: Path) -> None:
    words = ("prepare", "corpus.txt", "--output", "x", "--tokenizer", "tokenizer.json")
    assert "--append-eod ends each with one" in " ".join(run(data_verbs.app, *words).output.split())
    assert "with no mark" not in run(data_verbs.app, *words, "--append-eod").output


def test_a_flood_of_bad_records_is_counted(prepared: Path) -> None:
    Path("bad.jsonl").write_text('"fine"\n' + "broken\n" * 13)
    done = run(data_verbs.app, "prepare", "bad.jsonl", "--output", "x", "--tokenizer-kind", "bytes", "--skip-bad")
    assert done.output.count("not JSON") == 10 and "left out: 3 more" in done.output


def test_skipped_lines_are_counted_and_shown(prepared: Path) -> None:
    Path("bad.jsonl").write_text('"fine"\nbroken\n')
    with pytest.raises(DataError, match="bad.jsonl:2: not JSON: .*; mend it or take it out, or leave .* --skip-bad"):
        run(data_verbs.app, "prepare", "bad.jsonl", "--output", "x", "--tokenizer-kind", "bytes")
    with pytest.raises(DataError, match="mend it or take it out$"):  # of a caller without the option
        list(documents([Path("bad.jsonl")]))
    done = run(data_verbs.app, "prepare", "bad.jsonl", "--output", "x", "--tokenizer-kind", "bytes", "--skip-bad")
    assert "left out: bad.jsonl:2: not JSON" in done.output and "left out 1 bad" in done.output
