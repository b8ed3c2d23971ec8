"""The check for rows that became slower."""

import json
from pathlib import Path

import compare
import pytest
import results


def written(path: Path, *rows: tuple[str, list[float]], **changes: object) -> Path:
    """A file with these rows as a quiet machine gives them, but for `changes`."""
    line = {"benchmark": "generate", "clock": "wall", "threads": 2, "machine": "m", "busy": False}
    lines = [json.dumps(line | {"row": name, "seconds": seconds} | changes) for name, seconds in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("new", "changes", "code", "word"),
    [
        ([1.2, 1.1, 1.3], {}, 1, "slower"),
        ([1.2, 1.0, 1.3], {}, 0, "same"),  # the median alone
        ([1.5, 1.06, 1.0], {}, 0, "same"),
        ([0.5, 0.6, 0.7], {}, 0, "faster"),
        ([1.2, 1.1, 1.3], {"busy": True}, 0, "busy"),
        ([1.2, 1.1, 1.3], {"threads": 1}, 0, "another machine or setting"),
    ],
)
def test_a_row_is_slower_where_fastest_and_median_are(tmp_path, capsys, new, changes, code, word):
    old = written(tmp_path / "old", ("decode", [1.0]), ("decode", [1.02, 1.1]))
    assert compare.main([str(old), str(written(tmp_path / "new", ("decode", new), **changes))]) == code
    assert f"| {word} |" in capsys.readouterr().out


@pytest.mark.parametrize(("new", "code", "word"), [([0.0], 0, "same"), ([0.01], 1, "slower")])
def test_rows_that_took_no_time(tmp_path, capsys, new, code, word):
    old = written(tmp_path / "old", ("--help", [0.0, 0.0]))
    assert compare.main([str(old), str(written(tmp_path / "new", ("--help", new)))]) == code
    assert f"| {word} |" in capsys.readouterr().out


def test_processor_time_counts_on_a_busy_machine(tmp_path, capsys):
    sides = [
        written(tmp_path / name, ("decode", seconds), busy=True, clock="cpu")
        for name, seconds in {"old": [1.0], "new": [2.0]}.items()
    ]
    assert compare.main([str(side) for side in sides]) == 1


def test_rows_of_one_side_are_listed(tmp_path, capsys):
    old = written(tmp_path / "old", ("decode", [1.0]), ("gone", [1.0]))
    new = written(tmp_path / "new", ("decode", [1.0]), ("fresh", [1.0]))
    assert compare.main([str(old), str(new)]) == 0
    shown = capsys.readouterr().out
    assert "| generate: gone | | | | only before |" in shown and "| generate: fresh | | | | only now |" in shown


@pytest.mark.parametrize("text", ["", "no JSON\n", '{"row": "decode"}\n', "[]\n"])
def test_other_files_are_refused(tmp_path, capsys, text):
    (tmp_path / "bad").write_text(text)
    good = written(tmp_path / "good", ("decode", [1.0]))
    assert compare.main([str(good), str(tmp_path / "bad")]) == 2
    assert str(tmp_path / "bad") in capsys.readouterr().err
    assert compare.main([str(tmp_path / "missing"), str(good)]) == 2


def test_what_is_recorded_can_be_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "file", tmp_path / "rows")
    for seconds in ([0.25, 0.5], [0.75]):
        results.record("decode, 1 row", seconds, "cpu")
    (name,) = rows = compare.rows_of(tmp_path / "rows")
    assert name.endswith(": decode, 1 row") and rows[name].seconds == [0.25, 0.5, 0.75]
    line = json.loads((tmp_path / "rows").read_text().splitlines()[0])
    assert line["load"] >= 0 and line["threads"] >= 1 and line["busy"] in (True, False, None)
    assert compare.main([str(tmp_path / "rows")] * 2) == 0
