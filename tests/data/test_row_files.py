import csv
import json
from pathlib import Path

import pytest

from castalia.data.row_files import check_row_file, write_rows
from castalia.errors import ConfigError

BLOCKS = [[{"step": 1, "ids": [1, 2], "text": "é"}], [{"step": 2, "ids": [3], "text": None}]]
ROWS = [row for block in BLOCKS for row in block]


def test_json_lines_and_csv(tmp_path: Path) -> None:
    assert write_rows(tmp_path / "x.jsonl", BLOCKS) == write_rows(tmp_path / "new" / "x.csv", BLOCKS) == 2
    assert [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()] == ROWS
    with open(tmp_path / "new" / "x.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"step": "1", "ids": "[1, 2]", "text": "é"},
            {"step": "2", "ids": "[3]", "text": ""},
        ]


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    write_rows(tmp_path / "x.parquet", BLOCKS)
    assert parquet.read_table(tmp_path / "x.parquet").to_pylist() == ROWS


def test_nothing_is_left_of_a_file_whose_rows_fail(tmp_path: Path) -> None:
    def blocks():
        yield BLOCKS[0]
        raise ValueError("broken")

    for name in ("x.jsonl", "x.csv", "x.parquet"):
        with pytest.raises(ValueError, match="broken"):
            write_rows(tmp_path / name, blocks())
    assert not list(tmp_path.iterdir())


def test_other_endings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--output x.txt: the name of a file of rows ends with .jsonl, .csv, .pa"):
        check_row_file(Path("x.txt"))
