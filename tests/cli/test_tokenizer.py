"""`castalia tokenizer train` writes a file that others read."""

import json

import pytest

from castalia.cli import main as cli


def test_merges_are_strings_which_older_releases_of_tokenizers_read(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("In the beginning was the word, and the word was with God. " * 3)
    made = tmp_path / "made.json"
    monkeypatch.setattr(
        "sys.argv",
        ["castalia", "tokenizer", "train", str(tmp_path / "text.txt"), "--output", str(made), "--vocab-size", "262"],
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    merges = json.loads(made.read_text(encoding="utf-8"))["model"]["merges"]
    assert merges and all(isinstance(merge, str) for merge in merges)
