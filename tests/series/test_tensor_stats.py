from __future__ import annotations

import csv
import math

import pytest
import torch

from castalia.checkpoint.opener import open_checkpoint
from castalia.errors import ConfigError
from castalia.series.members import find_series
from castalia.series.table import check_table, write_table
from castalia.series.tensor_pass import PIECE_ELEMENTS, read_column
from castalia.series.tensor_stats import tensor_stats, top_singular_value
from castalia.storage.lazy import InMemory
from tests.series.changes import steps_of

NAME = "blocks.1.mlp.up.weight"


def test_figures_are_those_of_the_whole_tensors(trained, tmp_path):
    run = trained()
    rows = tensor_stats(find_series([run], "0,10,20"), tmp_path / "stats.csv", optimizer=True)
    values = {step: open_checkpoint(steps_of(run)[step]).model[NAME].read().double() for step in (0, 10, 20)}
    row = next(row for row in rows if row["tensor"] == NAME and row["step"] == 10)
    now = values[10]
    expected = {
        "norm": now.norm(),
        "mean": now.mean(),
        "std": now.std(correction=0),
        "max": now.abs().max(),
        "kurtosis": ((now - now.mean()) ** 4).mean() / now.var(correction=0) ** 2,
        "top_singular_value": torch.linalg.svdvals(now)[0],
        "first_distance": (now - values[0]).norm(),
        "previous_distance": (now - values[0]).norm(),
        "last_distance": (now - values[20]).norm(),
        "last_cosine": torch.cosine_similarity(now.flatten(), values[20].flatten(), 0),
    }
    for key, value in expected.items():
        assert row[key] == pytest.approx(float(value), rel=2e-4), key


def test_figures_of_the_optimizer_are_those_of_the_update(trained, tmp_path):
    """Without decay, the last update is the difference of two steps."""
    run = trained("optimizer.weight_decay=0.0", "optimizer.clip_norm=null")
    rows = tensor_stats(find_series([run], "9,10"), tmp_path / "stats.csv", optimizer=True)
    before, after = (open_checkpoint(steps_of(run)[step]).model[NAME].read().double() for step in (9, 10))
    row = next(row for row in rows if row["tensor"] == NAME and row["step"] == 10)
    assert row["update_ratio"] == pytest.approx(float((after - before).norm() / after.norm()), rel=1e-3)
    assert row["zero_first_moments"] == row["zero_second_moments"] == 0.0
    assert row["effective_lr_05"] < row["effective_lr_50"] < row["effective_lr_95"]


def test_layers_are_the_sums_of_their_tensors(trained, tmp_path):
    rows = tensor_stats(find_series([trained()], "0,20"), tmp_path / "stats.csv")
    layer = next(row for row in rows if row["layer"] == "block 0" and not row["tensor"] and row["step"] == 20)
    parts = [row for row in rows if row["layer"] == "block 0" and row["tensor"] and row["step"] == 20]
    assert layer["values"] == sum(row["values"] for row in parts)
    assert layer["norm"] == pytest.approx(math.sqrt(sum(row["norm"] ** 2 for row in parts)))
    assert {tuple(row) for row in rows} == {tuple(rows[0])}


def test_an_interrupted_table_goes_on(trained, tmp_path, monkeypatch):
    from castalia.series import tensor_stats as module

    members, output = find_series([trained()], "0,20"), tmp_path / "stats.csv"
    whole = tensor_stats(members, tmp_path / "other.csv")
    calls: list[str] = []

    def limited(name, *args, **options):
        calls.append(name)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return read_column(name, *args, **options)

    monkeypatch.setattr(module, "read_column", limited)
    with pytest.raises(KeyboardInterrupt):
        tensor_stats(members, output)
    assert repr(tensor_stats(members, output)) == repr(whole)  # NaN, too
    assert len(calls) == len(set(calls)) + 1  # only the tensor that was cut off is read again


@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (7, 1), (1, 9), (64, 64)])
def test_the_largest_singular_value(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    expected = float(torch.linalg.svdvals(matrix)[0])
    assert top_singular_value(InMemory(matrix)) == pytest.approx(expected, rel=1e-3)
    assert top_singular_value(InMemory(torch.zeros(shape))) == 0.0


def test_pieces_give_what_the_whole_gives():
    rows = 2 * PIECE_ELEMENTS // 512 + 3
    one = torch.randn(rows, 512, generator=torch.Generator().manual_seed(2))
    two = one + 0.01
    first, second = read_column("embed.weight", [InMemory(one), InMemory(two)], 1)
    assert first.squares == pytest.approx(float(one.double().square().sum()))
    assert second.previous is not None and second.previous.largest == pytest.approx(0.01, rel=1e-3)
    assert second.previous.squares == pytest.approx(1e-4 * one.numel(), rel=1e-3)
    assert first.digest != second.digest
    assert set(first.sample.tolist()) <= set(one.flatten().tolist())


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_tables_hold_the_rows(tmp_path, ending):
    path = tmp_path / f"table.{ending}"
    write_table(path, [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}])
    if ending == "csv":
        assert list(csv.reader(path.open())) == [["step", "loss"], ["1", "0.5"], ["2", ""]]
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        assert parquet.read_table(path).to_pylist() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"ends with .csv or .parquet"):
        check_table(tmp_path / "table.txt")
