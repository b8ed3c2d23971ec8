import numpy as np
import pytest

from castalia.checkpoint.opener import open_checkpoint
from castalia.config.schema import DataConfig, TokenizerConfig
from castalia.data.tokenizer import load_tokenizer
from castalia.errors import DataError
from castalia.report.held_out import HeldOutDocument, by_source, load, named_text, score, validation_text
from castalia.train.evaluation import evaluate_checkpoint

BYTES = load_tokenizer(TokenizerConfig(kind="bytes"))


def test_the_held_out_text_is_the_validation_data_by_source(corpora):
    data = DataConfig(train=corpora[0], valid=corpora[1:])
    held_out = validation_text(data, BYTES)
    assert [document.source for document in held_out.documents] == ["a"] * 5 + ["b"] * 5
    assert len(held_out.text) == held_out.num_tokens - 10  # without the ends of ten documents


def test_of_a_long_text_some_documents_are_looked_at(corpora):
    data = DataConfig(train=corpora[0], valid=corpora[1:])
    held_out = validation_text(data, BYTES, most_tokens=700)
    assert (held_out.num_tokens, held_out.of_documents) == (700, 10)
    assert held_out.of_tokens > 2000


def test_a_score_is_what_eval_says(run):
    judged = load(open_checkpoint(run), None)
    documents = validation_text(judged.config.data, judged.tokenizer).documents
    found = score(judged, documents)
    expected = evaluate_checkpoint(open_checkpoint(run))
    assert (found.loss, found.tokens) == (pytest.approx(expected["loss"]), expected["tokens"])
    assert found.bits_per_byte == pytest.approx(expected["bits_per_byte"])


def test_text_files_are_read_as_they_are(tmp_path):
    (tmp_path / "my.txt").write_text("So it goes.")
    held_out = named_text(str(tmp_path / "my.txt"), BYTES)
    assert (held_out.text, held_out.is_validation) == (b"So it goes.", False)
    with pytest.raises(DataError, match="neither a text file nor the prefix of a corpus"):
        named_text(str(tmp_path / "none.txt"), BYTES)


def test_without_held_out_text_the_way_out_is_told(corpora):
    with pytest.raises(DataError, match="holds out no text .* name some: --data FILE"):
        validation_text(DataConfig(train=corpora[0]), BYTES)
    with pytest.raises(DataError, match="does not exist.* to report on another text: --data FILE"):
        validation_text(DataConfig(train=corpora[0], valid="gone"), BYTES)


def test_small_sources_are_told_of_together():
    documents = [
        HeldOutDocument(f"file {number:02}", np.arange(2 + number), None, "x" * number) for number in range(30)
    ]
    groups = by_source(documents)
    assert [*groups][:2] == ["file 29", "file 28"]
    assert [*groups][-1] == "19 others" and len(groups["19 others"]) == 19


def test_of_many_files_folders_are_told_of():
    documents = [HeldOutDocument(f"{number % 2}/{number}", np.arange(9), None, "text") for number in range(30)]
    assert {name: len(own) for name, own in by_source(documents).items()} == {"0": 15, "1": 15}
