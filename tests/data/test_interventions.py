import json
from pathlib import Path

import numpy as np
import pytest

from castalia.config.schema import TokenizerConfig
from castalia.data.batch_rows import table_rows
from castalia.data.config_corpora import open_data
from castalia.data.seen import seen_in_run
from castalia.data.tokenizer import load_tokenizer
from castalia.errors import DataError
from tests.data.test_loader import config, corpus

IDS = [7, 8, 9, 10, 11, 12]


def with_rows(tmp_path: Path, *rows: dict | str, vocab: int = 50, **data):
    """The samples of four steps of two rows of five tokens, without and with interventions."""
    source = corpus(tmp_path / "x", [list(range(20, 45))] * 4)
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    plain = config(source, **data).with_({"model.vocab_size": vocab})
    return open_data(plain), open_data(plain.with_({"data.intervene": str(tmp_path / "rows.jsonl")}))


def test_rows_are_replaced_and_masked_and_all_others_stay(tmp_path: Path) -> None:
    changes = (
        {"step": 2, "row": 1, "ids": IDS},
        {"step": 3, "row": 0, "mask": [[2, 4]]},
        {"step": 4, "row": 1, "mask": True},
    )
    plain, changed = with_rows(tmp_path, *changes)
    for step in range(4):
        before, after = plain.batch(step), changed.batch(step)
        same = [row for row in range(2) if (step, row) not in {(1, 1), (2, 0), (3, 1)}]
        for old, new in zip(before[:3], after[:3], strict=True):
            assert np.array_equal(old[same], new[same])
    replaced, masked, all_masked = changed.batch(1), changed.batch(2), changed.batch(3)
    assert replaced.tokens[1].tolist() == IDS[:-1] and replaced.labels[1].tolist() == IDS[1:]
    assert np.array_equal(masked.tokens, plain.batch(2).tokens)
    assert masked.loss_mask[0].tolist() == [True, False, False, True, True]
    assert not all_masked.loss_mask[1].any() and all_masked.loss_mask[0].all()
    assert np.array_equal(changed.batch(1, [1]).tokens, replaced.tokens[1:])


def test_a_short_row_is_filled_up_without_loss(tmp_path: Path) -> None:
    _, changed = with_rows(tmp_path, {"step": 1, "row": 0, "ids": [7, 8, 9]}, mask_documents=True)
    batch = changed.batch(0)
    assert batch.tokens[0].tolist() == [7, 8, 9, 0, 0] and batch.loss_mask[0].tolist() == [True, True, *[False] * 3]
    assert batch.documents is not None and batch.documents[0].tolist() == [0, 0, 0, 1, 1]


def test_rows_are_weighted(tmp_path: Path) -> None:
    plain, changed = with_rows(tmp_path, {"step": 2, "row": 1, "weight": -2.5}, {"step": 3, "row": 0, "mask": True})
    assert changed.batch(1).weights.tolist() == [1.0, -2.5]
    assert changed.batch(1, [0]).weights is None and plain.batch(1).weights is None
    assert changed.batch(2).weights is None
    assert np.array_equal(changed.batch(1).labels, plain.batch(1).labels)
    assert [row.get("intervention") for row in table_rows(changed, 1, None)] == [None, "weighted -2.5"]
    lighter = with_rows(tmp_path, {"step": 2, "row": 1, "weight": 2.5}, {"step": 3, "row": 0, "mask": True})[1]
    assert lighter.fingerprint_until(1) == changed.fingerprint_until(1) != changed.fingerprint != lighter.fingerprint


def test_what_was_trained_on_until_a_step_is_told_apart(tmp_path: Path) -> None:
    plain, changed = with_rows(tmp_path, {"step": 3, "row": 0, "ids": IDS})
    assert changed.fingerprint_until(2) == plain.fingerprint_until(2) == plain.fingerprint
    assert changed.fingerprint_until(3) == changed.fingerprint != plain.fingerprint


def test_rows_of_a_batch_and_places_of_a_text_follow_the_interventions(tmp_path: Path) -> None:
    _, changed = with_rows(tmp_path, {"step": 2, "row": 1, "ids": list(b"abcabc"), "text": "is not read"}, vocab=256)
    row = table_rows(changed, 1, None)[1]
    assert row["ids"] == list(b"abcabc") and row["intervention"] == "replaced"
    assert table_rows(changed, 1, None)[0]["intervention"] is None
    letters = load_tokenizer(TokenizerConfig(kind="bytes"))
    (found,) = seen_in_run(changed, 4, ["ab"], letters)
    assert [(place.step, place.row, place.offset) for place in found.places] == [(2, 1, 0), (2, 1, 3)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"step": 0, "row": 0, "mask": True}, "steps are counted from 1"),
        ({"step": 5, "row": 0, "mask": True}, "step 5: the run's steps are 1 to 4"),
        ({"step": 1, "row": 2, "mask": True}, "step 1 has rows 0 to 1, and no row 2"),
        ({"step": 1, "row": 0}, "give ids, which replace the row, mask: true"),
        ('{"step": 1, "row": 0, "weight": 1e999}', "not a finite number|cannot be parsed"),
        ({"step": 1, "row": 0, "weight": "2"}, "is not a number"),
        ({"step": 1, "row": 0, "ids": [1] * 7}, "7 ids; a row has 2 to 6"),
        ({"step": 1, "row": 0, "mask": [[3, 2]]}, r"ranges are \[start, stop\]"),
        ({"step": "1", "row": 0}, "step='1' is not a whole number"),
        ("no json", "cannot be parsed"),
        ('{"step": 1, "row": 0, "mask": true}\n{"step": 1, "row": 0, "mask": true}', ":2: step 1, row 0 is already"),
    ],
)
def test_lines_that_are_no_interventions(tmp_path: Path, row, message: str) -> None:
    with pytest.raises(DataError, match=message):
        with_rows(tmp_path, row)


def test_ids_beyond_the_vocabulary_name_the_file(tmp_path: Path) -> None:
    _, changed = with_rows(tmp_path, {"step": 1, "row": 1, "ids": [1, 2, 50]})
    with pytest.raises(DataError, match=r"token id 50 of row 1 in .*rows.jsonl lies beyond the vocabulary of 50"):
        changed.batch(0)
