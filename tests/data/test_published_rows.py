from pathlib import Path

import numpy as np
import pytest

from castalia.data.dataset_writer import DatasetWriter
from castalia.data.published_rows import ParquetRows, ShardedRows, open_published
from castalia.errors import DataError

ROWS, LENGTH, BATCH = 22, 5, 4
IDS = np.random.RandomState(0).randint(0, 60000, (ROWS, LENGTH)).astype("<u2")


def sharded(folder: Path, shards: int = 4, index: bool = True) -> Path:
    """The rows in shards of equal size, the last one shorter, so that rows go on in the next shard."""
    if index:
        with DatasetWriter(folder / "document", "u2") as writer:
            for row in IDS:
                writer.add(row)
        (folder / "document.bin").unlink()
    raw, size = IDS.tobytes(), 66
    for number in range(shards):
        end = (number + 1) * size if number < shards - 1 else len(raw)
        (folder / f"document-{number:05}-of-{shards - 1:05}.bin").write_bytes(raw[number * size : end])
    return folder


def rows_of(source, steps: range | None = None) -> dict[tuple[int, int], list[int]]:
    found = {}
    for block in source.blocks(steps):
        for at, (step, row) in enumerate(zip(block.steps.tolist(), block.rows.tolist(), strict=True)):
            assert (step, row) not in found
            found[step, row] = block.tokens[block.starts[at] : block.starts[at + 1]].tolist()
    return found


def expected(rows) -> dict[tuple[int, int], list[int]]:
    return {divmod(number, BATCH): IDS[number].tolist() for number in rows}


@pytest.mark.parametrize("name", [".", "document", "document-00002-of-00003.bin"])
def test_shards_are_read_as_one_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    source = open_published(sharded(tmp_path) / name, BATCH)
    assert isinstance(source, ShardedRows) and not source.missing and source.bytes_here == IDS.nbytes
    assert rows_of(source) == expected(range(ROWS))
    assert rows_of(source, range(1, 3)) == expected(range(4, 12))
    with pytest.raises(DataError, match=r"step 6 is not in these files: they hold 5 steps"):
        rows_of(source, range(5, 6))


def test_shards_that_are_not_here_leave_a_gap(tmp_path: Path) -> None:
    (sharded(tmp_path) / "document-00001-of-00003.bin").unlink()
    source = open_published(tmp_path, BATCH)
    assert isinstance(source, ShardedRows) and source.missing == ("document-00001-of-00003.bin",)
    gone = [row for row in range(ROWS) if row * 10 < 132 and (row + 1) * 10 > 66]
    assert rows_of(source) == expected(row for row in range(ROWS) if row not in gone)
    assert rows_of(source, range(4, 5)) == expected(range(16, 20))
    with pytest.raises(DataError, match="shard 00001 is not here"):
        rows_of(source, range(1, 2))


def test_without_an_index_rows_are_pythias(tmp_path: Path) -> None:
    ids = np.arange(3 * 2049, dtype="<u2")
    (tmp_path / "document-00000-of-00000.bin").write_bytes(ids.tobytes())
    source = open_published(tmp_path, 2)
    assert source is not None
    assert rows_of(source, range(1)) == {(0, 0): ids[:2049].tolist(), (0, 1): ids[2049:4098].tolist()}


@pytest.mark.parametrize("with_steps", [True, False])
def test_parquet_files_in_the_order_of_their_names(tmp_path: Path, with_steps: bool) -> None:
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    for number, (first, end) in enumerate([(0, 10), (10, 22)]):
        columns = {"uid": list(range(first, end)), "token_ids": [row.tolist() for row in IDS[first:end]]}
        if with_steps:
            columns["batch_idx"] = [row // BATCH for row in range(first, end)]
        parquet.write_table(arrow.table(columns), tmp_path / f"train-{number:06}.parquet", row_group_size=3)
    source = open_published(tmp_path, BATCH)
    assert isinstance(source, ParquetRows)
    assert rows_of(source) == expected(range(ROWS))
    assert rows_of(source, range(2, 4)) == expected(range(8, 16))
    with pytest.raises(DataError, match="step 8 is not in"):
        rows_of(source, range(7, 8))
    alone = open_published(tmp_path / "train-000001.parquet", BATCH)
    if with_steps:
        assert rows_of(alone, range(3, 4)) == expected(range(12, 16))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "document-00003-of-00003.bin").write_bytes(b"abc"), "not whole rows of 5 ids"),
        (lambda folder: (folder / "document-00001-of-00003.bin").write_bytes(b"abc"), "have one size"),
        (lambda folder: (folder / "other-00001-of-00003.bin").write_bytes(b"abc"), "several files: document, other"),
        (lambda folder: [p.unlink() for p in folder.glob("document-0000[012]*")], "is the last shard"),
        (lambda folder: (folder / "document-00000-of-00003.bin").write_bytes(b"version https://git-lfs"), "LFS"),
    ],
)
def test_files_that_do_not_fit_together(tmp_path: Path, spoil, message: str) -> None:
    spoil(sharded(tmp_path))
    with pytest.raises(DataError, match=message):
        open_published(tmp_path, BATCH)


def test_other_files_are_no_published_rows(tmp_path: Path) -> None:
    (tmp_path / "run.yml").write_text("train: {}\n")
    assert open_published(tmp_path) is None and open_published(tmp_path / "run.yml") is None
    assert open_published("pythia-14m") is None
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="is not parquet, or damaged"):
        list(open_published(tmp_path).blocks())  # type: ignore[union-attr]
