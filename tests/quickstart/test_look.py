"""What of a folder is read, what is passed over, and why."""

import json

import pytest

from castalia.errors import DataError
from castalia.quickstart.look import look, texts


@pytest.fixture
def folder(tmp_path):
    mine = tmp_path / "mine"
    (mine / "sub").mkdir(parents=True)
    (mine / "a.txt").write_text("first text\n")
    (mine / "sub/b.md").write_text("# second text\n")
    (mine / "sub/c.html").write_text("<html><head><title>x</title></head><body><p>third <b>text</b></p></body></html>")
    (mine / "d.jsonl").write_text("\n".join([json.dumps({"id": 7, "body": "fourth text"}), "broken", ""]))
    (mine / "e.jsonl").write_text(json.dumps({"id": 7}) + "\n")
    (mine / "f.png").write_bytes(b"\x00")
    (mine / ".hidden").write_text("no")
    return mine


def test_files_of_all_kinds_are_read_and_the_others_are_counted(folder):
    seen = look(folder)
    assert sorted(texts(seen, 1 << 20)) == ["# second text\n", "first text\n", "fourth text", "third text"]
    assert seen.left_out == {".png": 1, "hidden": 1, ".jsonl without a text field": 1}
    assert len(seen.bad) == 1 and "d.jsonl:2" in seen.bad[0]
    assert (seen.documents, seen.exact) == (4, True)
    assert seen.bytes == sum(map(len, texts(seen, 1 << 20)))


def test_what_an_earlier_run_wrote_below_the_folder_is_no_text(folder):
    (folder / "runs/mine").mkdir(parents=True)
    (folder / "runs/mine/report.html").write_text("<p>all about the run</p>")
    seen = look(folder, not_inside=folder / "runs/mine")
    assert seen.documents == 4
    assert seen.left_out["of earlier runs here"] == 1


def test_parquet_is_read_by_the_column_that_holds_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": [1, 2], "content": ["one", "two"]}), tmp_path / "a.parquet")
    assert list(texts(look(tmp_path), 1 << 20)) == ["one", "two"]


@pytest.mark.parametrize(("files", "message"), [([], "holds no text that can be read"), (["a.txt"], "hold no text")])
def test_folders_without_text_are_refused(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text("")
    with pytest.raises(DataError, match=message):
        look(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        look(tmp_path / "nowhere")
